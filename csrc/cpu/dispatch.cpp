// The choice of an ISA: what each needs, and which of them this machine can run.
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "isa.h"

#define QK_HAS(feature) (__builtin_cpu_supports(feature) != 0)
#define QK_NEEDS_baseline true
#define QK_NEEDS_avx2 (QK_HAS("avx2") && QK_HAS("fma") && QK_HAS("f16c"))
#define QK_NEEDS_avx512 \
  (QK_NEEDS_avx2 && QK_HAS("avx512f") && QK_HAS("avx512bw") && QK_HAS("avx512dq") && QK_HAS("avx512vl"))
#define QK_NEEDS_avx512_vnni (QK_NEEDS_avx512 && QK_HAS("avx512vnni"))
#define QK_NEEDS_avx512_icelake (QK_NEEDS_avx512_vnni && QK_HAS("avx512vbmi"))
#define QK_NEEDS_avx512_bf16 (QK_NEEDS_avx512_icelake && QK_HAS("avx512bf16"))

namespace qk::cpu {
namespace {

// By Isa. Whether this machine has what each needs.
const struct {
  const char* name;
  bool present;
} isas[] = {
#define QK_ISA_ROW(isa) {#isa, QK_NEEDS_##isa},
    QK_FOR_EACH_ISA(QK_ISA_ROW)
#undef QK_ISA_ROW
};

// The limit that the user set for torch. It has no name for an ISA above the AVX-512 of Skylake, so avx512 excludes the
// wider ones.
bool allowed(const char* isa) {
  const char* const capability = std::getenv("ATEN_CPU_CAPABILITY");
  if (!capability || !std::strcmp(isa, "baseline")) return true;
  if (!std::strcmp(capability, "default")) return false;
  if (!std::strcmp(capability, "avx2")) return !std::strcmp(isa, "avx2");
  return !std::strcmp(isa, "avx512") || !std::strcmp(isa, "avx2");
}

std::string present_isas() {
  std::string names;
  for (int isa = kIsas; isa-- > 0;)
    if (isas[isa].present) names += (names.empty() ? "" : ", ") + std::string(isas[isa].name);
  return names + ", which this machine has of those compiled (" + compiled_isas() + ")";
}

// The widest ISA that the machine and the limit allow.
Isa best_isa() {
  const char* const named = std::getenv("QATKERNELS_ISA");
  for (int isa = kIsas; isa-- > 0;)
    if (isas[isa].present && (named && *named ? !std::strcmp(named, isas[isa].name) : allowed(isas[isa].name)))
      return static_cast<Isa>(isa);
  throw std::runtime_error(std::string("QATKERNELS_ISA is '") + named + "', must be one of " + present_isas());
}

// The ISA of this name, or kIsas if this machine or this build does not have it.
int find_isa(const std::string& name) {
  int isa = 0;
  while (isa < kIsas && !(isas[isa].present && name == isas[isa].name)) ++isa;
  return isa;
}

}  // namespace

Isa choose_isa() {
  int known = -1;
  const Isa best = best_isa();
  // Another thread may have stored its choice first: the same one, or that of a test.
  return chosen_isa.compare_exchange_strong(known, best) ? best : static_cast<Isa>(known);
}

const char* name_of(Isa isa) { return isas[isa].name; }

const char* use_isa(const std::string& name) {
  const int wanted = find_isa(name);
  if (wanted == kIsas) throw std::invalid_argument("isa is '" + name + "', must be one of " + present_isas());
  const Isa former = isa();
  chosen_isa.store(wanted);
  return name_of(former);
}

bool has_isa(const std::string& name) { return find_isa(name) < kIsas; }

std::string compiled_isas() {
  std::string names;
  for (const auto& isa : isas) names += std::string(isa.name) + ' ';
  names.pop_back();
  return names;
}

}  // namespace qk::cpu
