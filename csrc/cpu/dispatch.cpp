// The one choice of an ISA.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#define QK_DECLARE(isa)                                                                                          \
  namespace isa {                                                                                                \
  void forward(const Forward&, int64_t, int64_t);                                                                \
  void backward(const Backward&, double*, int64_t, int64_t);                                                     \
  void finish_backward(const Backward&, const double*);                                                          \
  void jvp(const Jvp&, int64_t, int64_t);                                                                        \
  void quantize(const Quantize&, int64_t, int64_t);                                                              \
  void dequantize(const Dequantize&, int64_t, int64_t);                                                          \
  void dynamic(const Dynamic&, int64_t, int64_t);                                                                \
  void normal(const Normal&, int64_t, int64_t);                                                                  \
  constexpr Kernels table{#isa, forward, backward, finish_backward, jvp, quantize, dequantize, dynamic, normal}; \
  }

namespace qk {

QK_DECLARE(baseline)
#if defined(__x86_64__)
QK_DECLARE(avx2)
QK_DECLARE(avx512)
QK_DECLARE(avx512_bf16)

static const Kernels& choose() {
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  int limit = 3;
  if (capability) limit = !std::strcmp(capability, "default") ? 0 : !std::strcmp(capability, "avx2") ? 1 : 2;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16 && limit >= 3) return avx512_bf16::table;
  if (avx512 && limit >= 2) return avx512::table;
  if (avx2 && limit >= 1) return avx2::table;
  return baseline::table;
}
const char* compiled_isas() { return "baseline avx2 avx512 avx512_bf16"; }
#else
static const Kernels& choose() { return baseline::table; }
const char* compiled_isas() { return "baseline"; }
#endif

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace qk
