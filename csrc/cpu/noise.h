// Normals in memory order, a cache-sized piece at a time.
#pragma once

#include "../common/philox.h"
#include "kernels.h"
#include "simd.h"

namespace qk {
namespace QK_ISA {

template <class R, size_t... I>
QK_HD R interleave_low(R a, R b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I % 2 ? n + int(I) / 2 : int(I) / 2)...);
}
template <class R, size_t... I>
QK_HD R interleave_high(R a, R b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I % 2 ? n + n / 2 + int(I) / 2 : n / 2 + int(I) / 2)...);
}

// Elements 64 * block ... 64 * block + 63 of a stream.
inline void sixty_four_normals(uint64_t seed, uint64_t block, uint32_t stream, float* out) {
  U32 counter;
  for (int i = 0; i < kLanes; ++i)
    counter.part[i / U32::kWidth][i % U32::kWidth] = static_cast<uint32_t>(block * kLanes) + i;
  const U32 counter_high(static_cast<uint32_t>(block * kLanes >> 32));
  F32 z[4];
  four_normals<F32, U32>(seed, counter, counter_high, stream, z);
  constexpr std::make_index_sequence<F32::kWidth> lanes{};
  for (int i = 0; i < F32::kCount; ++i) {
    const auto low02 = interleave_low(z[0].part[i], z[2].part[i], lanes);
    const auto high02 = interleave_high(z[0].part[i], z[2].part[i], lanes);
    const auto low13 = interleave_low(z[1].part[i], z[3].part[i], lanes);
    const auto high13 = interleave_high(z[1].part[i], z[3].part[i], lanes);
    const F32::Reg ordered[4] = {interleave_low(low02, low13, lanes), interleave_high(low02, low13, lanes),
                                 interleave_low(high02, high13, lanes), interleave_high(high02, high13, lanes)};
    std::memcpy(out + 4 * i * F32::kWidth, ordered, sizeof ordered);
  }
}

// The normals of elements [begin, begin + n), n <= kNoiseSpan.
class NoiseSpan {
 public:
  const float* draw(uint64_t seed, int64_t begin, int64_t n, uint32_t stream) {
    const int64_t first = begin / 64, last = (begin + n + 63) / 64;
    for (int64_t block = first; block < last; ++block)
      sixty_four_normals(seed, block, stream, buffer_ + (block - first) * 64);
    return buffer_ + (begin - first * 64);
  }

 private:
  alignas(64) float buffer_[kNoiseSpan + 128];
};

inline float one_normal(uint64_t seed, int64_t i, uint32_t stream) {
  float block[64];
  sixty_four_normals(seed, i / 64, stream, block);
  return block[i % 64];
}

}  // namespace QK_ISA
}  // namespace qk
