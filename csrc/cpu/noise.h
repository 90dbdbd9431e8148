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

// The low halves of eight, four or two 64-bit lanes times b.
using Wide = Register<uint64_t>;
QK_HD Wide multiply_low(Wide a, uint32_t b) {
#if defined(__AVX512F__)
  return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__)
  return (Wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

// Philox at counters first ... first + 15, which share their high halves.
//
// A counter's words stay in 64-bit lanes over all rounds, so that a product needs no shuffle; what is in the high
// halves of x0 to x3 does not matter. Even and odd counters become one register at the end.
inline Words<U32> philox(uint64_t seed, uint64_t first, uint32_t stream) {
  const uint32_t low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
  Words<U32> words;
  for (int i = 0; i < U32::kCount; ++i) {
    Wide parity[2][4];
    for (int odd = 0; odd < 2; ++odd) {
      Wide x0, x1 = high - Wide{}, x2 = stream - Wide{}, x3{};
      for (int j = 0; j < U32::kWidth / 2; ++j) x0[j] = i * U32::kWidth + 2 * j + odd;
      x0 += low;
      uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
      for (int round = 0; round < kRounds; ++round) {
        const Wide product0 = multiply_low(x0, kMultiplier0), product1 = multiply_low(x2, kMultiplier1);
        x0 = (product1 >> 32) ^ x1 ^ uint64_t(k0);
        x1 = product1;
        x2 = (product0 >> 32) ^ x3 ^ uint64_t(k1);
        x3 = product0;
        k0 += kIncrement0;
        k1 += kIncrement1;
      }
      parity[odd][0] = x0;
      parity[odd][1] = x1;
      parity[odd][2] = x2;
      parity[odd][3] = x3;
    }
    U32* const out[4] = {&words.x0, &words.x1, &words.x2, &words.x3};
    for (int word = 0; word < 4; ++word)
      out[word]->part[i] = (U32::Reg)((parity[0][word] & 0xFFFFFFFFu) | (parity[1][word] << 32));
  }
  return words;
}

constexpr int kBlock = 8 * kLanes;  // normals drawn at once

// Elements kBlock * block ... kBlock * block + kBlock - 1 of a stream.
inline void block_of_normals(uint64_t seed, uint64_t block, uint32_t stream, float* out) {
  const Words<U32> x = philox(seed, block * kLanes, stream);
  F32 z[8];
  box_muller<F32, U32>(x.x0, z[0], z[1]);
  box_muller<F32, U32>(x.x1, z[2], z[3]);
  box_muller<F32, U32>(x.x2, z[4], z[5]);
  box_muller<F32, U32>(x.x3, z[6], z[7]);
  // Lane i of z[j] is element 8 * i + j: three perfect shuffles.
  constexpr std::make_index_sequence<F32::kWidth> lanes{};
  for (int i = 0; i < F32::kCount; ++i) {
    F32::Reg a[8], b[8];
    for (int j = 0; j < 8; ++j) a[j] = z[j].part[i];
    for (int j = 0; j < 4; ++j) {
      b[j] = interleave_low(a[j], a[j + 4], lanes);
      b[j + 4] = interleave_high(a[j], a[j + 4], lanes);
    }
    for (int half = 0; half < 8; half += 4)
      for (int j = 0; j < 2; ++j) {
        a[half + j] = interleave_low(b[half + j], b[half + j + 2], lanes);
        a[half + j + 2] = interleave_high(b[half + j], b[half + j + 2], lanes);
      }
    for (int j = 0; j < 8; j += 2) {
      b[j] = interleave_low(a[j], a[j + 1], lanes);
      b[j + 1] = interleave_high(a[j], a[j + 1], lanes);
    }
    std::memcpy(out + 8 * i * F32::kWidth, b, sizeof b);
  }
}

// The normals of elements [begin, begin + n), n <= kNoiseSpan.
class NoiseSpan {
 public:
  const float* draw(uint64_t seed, int64_t begin, int64_t n, uint32_t stream) {
    const int64_t first = begin / kBlock, last = (begin + n + kBlock - 1) / kBlock;
    for (int64_t block = first; block < last; ++block)
      block_of_normals(seed, block, stream, buffer_ + (block - first) * kBlock);
    return buffer_ + (begin - first * kBlock);
  }

 private:
  alignas(64) float buffer_[kNoiseSpan + 2 * kBlock];
};

}  // namespace QK_ISA
}  // namespace qk
