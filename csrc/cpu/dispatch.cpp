// The one choice of an ISA.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#define QK_FUNCTION(name, arguments) void name arguments;
#define QK_ENTRY(name, arguments) , name
#define QK_DECLARE(isa)                                                             \
  namespace isa {                                                                   \
  QK_KERNELS(QK_FUNCTION)                                                           \
  int64_t lowbit_memory(const LowbitLinear&);                                       \
  int64_t lowbit_tokens(const LowbitLinear&);                                       \
  constexpr Kernels table{#isa QK_KERNELS(QK_ENTRY), lowbit_memory, lowbit_tokens}; \
  }

namespace qk {

QK_DECLARE(baseline)
#if defined(__x86_64__)
QK_DECLARE(avx2)
QK_DECLARE(avx512)
QK_DECLARE(avx512_vnni)
QK_DECLARE(avx512_bf16)

// Widest first; what a machine has to have for each.
static const struct {
  const Kernels& table;
  bool present;
} isas[] = {
#define QK_HAS(feature) (__builtin_cpu_supports(feature) != 0)
#define QK_AVX2 (QK_HAS("avx2") && QK_HAS("fma") && QK_HAS("f16c"))
#define QK_AVX512 (QK_AVX2 && QK_HAS("avx512f") && QK_HAS("avx512bw") && QK_HAS("avx512dq") && QK_HAS("avx512vl"))
#define QK_VNNI (QK_AVX512 && QK_HAS("avx512vnni") && QK_HAS("avx512vbmi"))
    {avx512_bf16::table, QK_VNNI&& QK_HAS("avx512bf16")},
    {avx512_vnni::table, QK_VNNI},
    {avx512::table, QK_AVX512},
    {avx2::table, QK_AVX2},
    {baseline::table, true},
};
const char* compiled_isas() { return "baseline avx2 avx512 avx512_vnni avx512_bf16"; }

// torch's own limit, in its words.
static bool allowed(const char* isa) {
  const char* const capability = std::getenv("ATEN_CPU_CAPABILITY");
  if (!capability || !std::strcmp(isa, "baseline")) return true;
  if (!std::strcmp(capability, "default")) return false;
  if (!std::strcmp(capability, "avx2")) return !std::strcmp(isa, "avx2");
  return !std::strcmp(isa, "avx512") || !std::strcmp(isa, "avx2");
}
#else
static const struct {
  const Kernels& table;
  bool present;
} isas[] = {{baseline::table, true}};
const char* compiled_isas() { return "baseline"; }
static bool allowed(const char*) { return true; }
#endif

bool has_isa(const char* name) {
  for (const auto& isa : isas)
    if (isa.present && !std::strcmp(name, isa.table.isa)) return true;
  return false;
}

static const Kernels& choose() {
  const char* const named = std::getenv("QATKERNELS_ISA");
  for (const auto& isa : isas)
    if (isa.present && (named && *named ? !std::strcmp(named, isa.table.isa) : allowed(isa.table.isa)))
      return isa.table;
  throw std::runtime_error(std::string("QATKERNELS_ISA is '") + named + "', must be one of " + compiled_isas() +
                           " that this machine has");
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace qk
