// Noise by itself on the CPU.
#include "noise.h"

#include <algorithm>

#include "noise_span.h"

namespace qk {
namespace QK_ISA {

void normal(const NormalCall& call, int64_t begin, int64_t end) {
  NoiseSpan noise;
  for (int64_t span = begin; span < end; ++span) {
    const int64_t first = span * kNoiseSpan, n = std::min(kNoiseSpan, call.numel - first);
    std::memcpy(call.out + first, noise.draw(*call.seed, first, n, call.stream), n * sizeof(float));
  }
}

}  // namespace QK_ISA
}  // namespace qk
