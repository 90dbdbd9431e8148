// Gaussian noise on the CPU: standard normals for a range of elements, in memory order, at most kNoiseSpan at a time.
#pragma once

#include "../common/philox.h"
#include "elements.h"
#include "units.h"

namespace qk {
namespace QK_ISA {

// The low halves of eight, four or two 64-bit lanes times b.
using Wide = Register<uint64_t>;
QK_INLINE Wide multiply_low(Wide a, uint32_t b) {
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

constexpr int kWide = kRegisterBytes / sizeof(uint64_t);  // counters in a register
constexpr int kNoiseBlock = 64;  // normals from as many counters as the widest registers hold, drawn together

// [a0, b0, a2, b2, ...] and [a1, b1, a3, b3, ...]
template <size_t... I>
QK_INLINE Wide pair_even(Wide a, Wide b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I % 2 ? kWide + int(I) - 1 : int(I))...);
}
template <size_t... I>
QK_INLINE Wide pair_odd(Wide a, Wide b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I % 2 ? kWide + int(I) : int(I) + 1)...);
}

// Philox: the words of `Registers` * kWide counters from `first` on, in order.
//
// The words of a counter stay in a 64-bit lane over all rounds, so that a product needs no shuffle; the high halves of
// x0 to x3 are garbage. Counters are assigned to lanes in the order that takes fewest shuffles at the end. The rounds
// of one register depend on each other, so several registers are interleaved.
template <int Registers>
QK_INLINE void philox(uint64_t seed, uint64_t first, uint32_t stream, uint32_t* out) {
  Wide x0[Registers], x1[Registers], x2[Registers], x3[Registers];
  for (int i = 0; i < Registers; ++i) {
    for (int j = 0; j < kWide; ++j) x0[i][j] = i * kWide + j % 2 * (kWide / 2) + j / 2;
    x0[i] += first;
    x1[i] = x0[i] >> 32;
    x2[i] = stream - Wide{};
    x3[i] = Wide{};
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < Registers; ++i) {
      const Wide product0 = multiply_low(x0[i], kMultiplier0), product1 = multiply_low(x2[i], kMultiplier1);
      x0[i] = (product1 >> 32) ^ x1[i] ^ uint64_t(k0);
      x1[i] = product1;
      x2[i] = (product0 >> 32) ^ x3[i] ^ uint64_t(k1);
      x3[i] = product0;
    }
    k0 += kIncrement0;
    k1 += kIncrement1;
  }
  constexpr std::make_index_sequence<kWide> lanes{};
  for (int i = 0; i < Registers; ++i) {
    const Wide low = (x0[i] & 0xFFFFFFFFu) | (x1[i] << 32), high = (x2[i] & 0xFFFFFFFFu) | (x3[i] << 32);
    const Wide pairs[2] = {pair_even(low, high, lanes), pair_odd(low, high, lanes)};
    std::memcpy(out + i * 4 * kWide, pairs, sizeof pairs);
  }
}

// The 32 normals of sixteen words, in order.
QK_INLINE void normals_of(const uint32_t* words, float* out) {
  F32 first, second;
  box_muller<F32, U32>(load(words), first, second);
  constexpr std::make_index_sequence<F32::kWidth> lanes{};
  for (int i = 0; i < F32::kCount; ++i) {
    const F32::Reg pairs[2] = {interleave_low(first.part[i], second.part[i], lanes),
                               interleave_high(first.part[i], second.part[i], lanes)};
    std::memcpy(out + i * 2 * F32::kWidth, pairs, sizeof pairs);
  }
}

// The normals of elements [begin, begin + n), n <= kNoiseSpan.
class NoiseSpan {
 public:
  const float* draw(uint64_t seed, int64_t begin, int64_t n, uint32_t stream) {
    const int64_t first = begin / kNoiseBlock * kNoiseBlock,
                  words = (begin + n - first + kNoiseBlock - 1) / kNoiseBlock * kNoiseBlock / 2;
    int64_t word = 0;
    const auto draw_words = [&](auto registers) {
      constexpr int kCount = decltype(registers)::value;
      for (; word + 4 * kWide * kCount <= words; word += 4 * kWide * kCount)
        philox<kCount>(seed, (first / 2 + word) / 4, stream, words_ + word);
    };
    draw_words(std::integral_constant<int, 4>{});
    draw_words(std::integral_constant<int, 1>{});
    for (int64_t i = 0; i < words; i += kLanes) normals_of(words_ + i, normals_ + 2 * i);
    return normals_ + (begin - first);
  }

 private:
  static_assert(kNoiseBlock % (8 * kWide) == 0 && kNoiseBlock / 2 % kLanes == 0,
                "a block fills whole registers of words");

  alignas(64) uint32_t words_[(kNoiseSpan + kNoiseBlock) / 2];
  alignas(64) float normals_[kNoiseSpan + kNoiseBlock];
};

}  // namespace QK_ISA
}  // namespace qk
