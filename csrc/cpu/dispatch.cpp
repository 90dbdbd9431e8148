// The choice of an ISA: a table of kernels for each, and which of them this machine can run. CMake says which were
// built (QK_HAVE_<isa>, QK_COMPILED_ISAS).
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#define QK_FUNCTION(name, arguments) void name arguments;
#define QK_ENTRY(name, arguments) , name
#define QK_DECLARE(isa)                                            \
  namespace isa {                                                  \
  QK_KERNELS(QK_FUNCTION)                                          \
  LowbitPlan lowbit_plan(const LowbitLinearCall&);                 \
  constexpr Kernels table{#isa QK_KERNELS(QK_ENTRY), lowbit_plan}; \
  }

namespace qk {

QK_DECLARE(baseline)
#ifdef QK_HAVE_avx2
QK_DECLARE(avx2)
#endif
#ifdef QK_HAVE_avx512
QK_DECLARE(avx512)
#endif
#ifdef QK_HAVE_avx512_icelake
QK_DECLARE(avx512_icelake)
#endif
#ifdef QK_HAVE_avx512_bf16
QK_DECLARE(avx512_bf16)
#endif

namespace {

// Widest first, and whether this machine has what each needs.
const struct {
  const Kernels& table;
  bool present;
} isas[] = {
#define QK_HAS(feature) (__builtin_cpu_supports(feature) != 0)
#define QK_AVX2 (QK_HAS("avx2") && QK_HAS("fma") && QK_HAS("f16c"))
#define QK_AVX512 (QK_AVX2 && QK_HAS("avx512f") && QK_HAS("avx512bw") && QK_HAS("avx512dq") && QK_HAS("avx512vl"))
#define QK_ICELAKE (QK_AVX512 && QK_HAS("avx512vnni") && QK_HAS("avx512vbmi"))
#ifdef QK_HAVE_avx512_bf16
    {avx512_bf16::table, QK_ICELAKE&& QK_HAS("avx512bf16")},
#endif
#ifdef QK_HAVE_avx512_icelake
    {avx512_icelake::table, QK_ICELAKE},
#endif
#ifdef QK_HAVE_avx512
    {avx512::table, QK_AVX512},
#endif
#ifdef QK_HAVE_avx2
    {avx2::table, QK_AVX2},
#endif
    {baseline::table, true},
};

// torch's own limit. It has no name for an ISA above the AVX-512 of Skylake, so avx512 excludes the wider ones.
bool allowed(const char* isa) {
  const char* const capability = std::getenv("ATEN_CPU_CAPABILITY");
  if (!capability || !std::strcmp(isa, "baseline")) return true;
  if (!std::strcmp(capability, "default")) return false;
  if (!std::strcmp(capability, "avx2")) return !std::strcmp(isa, "avx2");
  return !std::strcmp(isa, "avx512") || !std::strcmp(isa, "avx2");
}

std::string present_isas() {
  std::string names;
  for (const auto& isa : isas)
    if (isa.present) names += (names.empty() ? "" : ", ") + std::string(isa.table.isa);
  return names + ", which this machine has of those compiled (" + compiled_isas() + ")";
}

const Kernels& choose() {
  const char* const named = std::getenv("QATKERNELS_ISA");
  for (const auto& isa : isas)
    if (isa.present && (named && *named ? !std::strcmp(named, isa.table.isa) : allowed(isa.table.isa)))
      return isa.table;
  throw std::runtime_error(std::string("QATKERNELS_ISA is '") + named + "', must be one of " + present_isas());
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const char* compiled_isas() { return QK_COMPILED_ISAS; }

bool has_isa(const char* name) {
  for (const auto& isa : isas)
    if (isa.present && !std::strcmp(name, isa.table.isa)) return true;
  return false;
}

const Kernels& kernels() {
  if (const Kernels* const known = chosen.load(std::memory_order_acquire)) return *known;
  const Kernels* known = nullptr;
  const Kernels& found = choose();
  // Another thread may have been first, with the same choice or a test's.
  return chosen.compare_exchange_strong(known, &found) ? found : *known;
}

const char* use_isa(const std::string& name) {
  for (const auto& isa : isas)
    if (isa.present && name == isa.table.isa) {
      const char* const former = kernels().isa;
      chosen.store(&isa.table, std::memory_order_release);
      return former;
    }
  throw std::invalid_argument("isa is '" + name + "', must be one of " + present_isas());
}

}  // namespace qk
