// Packed weights in AVX-512 registers: sixteen rows at once, a row in each 32-bit lane.
//
// 64 bytes of each of sixteen rows, a chunk, are transposed, so that a register holds word w of the sixteen rows. Codes
// of 1, 2, 4 and 8 bits are 32 / bits to a word as they are stored; those of 3, 5, 6 and 7 bits are expanded to bytes
// first, four to a word.
//
//              loaded: a row in a register                        transposed: a word in a register
//           lane 0   lane 1         lane 15                     lane 0   lane 1         lane 15
//     t[0]  r0 w0  | r0 w1  | ... | r0 w15                t[0]  r0 w0  | r1 w0  | ... | r15 w0
//     t[1]  r1 w0  | r1 w1  | ... | r1 w15       -->      t[1]  r0 w1  | r1 w1  | ... | r15 w1
//     ...                                                 ...
//     t[15] r15 w0 | r15 w1 | ... | r15 w15               t[15] r0 w15 | r1 w15 | ... | r15 w15
//
// A multiply instruction takes 32-bit operands of four int8 or two bfloat16. Shifting a word and masking it gives them
// one after another, which takes the codes of a word out of order. So it is the activations that are permuted, once
// when they are prepared. For 4 bits and int8, with code c0 in the lowest bits of the word:
//
//     word                        c7 c6 c5 c4 c3 c2 c1 c0        of columns 0 ... 7
//     operand 0   word & 0x0F..      c6    c4    c2    c0        times activations 0 2 4 6
//     operand 1   word >> 4 & ..     c7    c5    c3    c1        times activations 1 3 5 7
//
// The operands of an activation row lie in one of two orders (LowbitPlan::chunk_major), w.o being operand o of word w:
//
//     word after word   0.0 0.1 | 1.0 1.1 | 2.0 2.1 | ...       4 bytes, broadcast, times word w of 16 weight rows
//     chunk-major       0.0 1.0 ... 15.0 | 0.1 1.1 ... 15.1     64 bytes, times the 16 words of one weight row
#pragma once

#include "lowbit_kernels.h"
#include "packed_codes.h"
#include "transpose.h"

#if defined(QK_LOWBIT_VNNI)
namespace qk {
namespace QK_ISA {

// Codes in a 32-bit word of a row, and in a chunk.
constexpr int64_t word_codes(int bits) { return bits == 1 || bits == 2 || bits == 4 ? 32 / bits : 4; }
constexpr int64_t chunk_codes(int bits) { return 16 * word_codes(bits); }

// Whether each group is whole words.
inline bool has_whole_words(const LowbitLinearCall& call) {
  return call.groups == 1 || call.cols / call.groups % word_codes(call.bits) == 0;
}

QK_INLINE __mmask64 mask_bytes(int64_t n) { return n >= 64 ? ~__mmask64{0} : n <= 0 ? 0 : (__mmask64{1} << n) - 1; }
QK_INLINE __mmask16 mask_lanes(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1);
}

// The words of chunk `chunk` of sixteen rows, transposed; rows beyond `count` give zeros.
template <int Bits>
QK_INLINE void load_words(const uint8_t* rows, int64_t stride, int64_t count, int64_t chunk, __m512i t[16]) {
  constexpr int64_t bytes = chunk_codes(Bits) * Bits / 8;
  const uint8_t* const from = rows + chunk * bytes;
  const __mmask64 valid = mask_bytes(std::min(bytes, stride - chunk * bytes));
  for (int64_t r = 0; r < 16; ++r) {
    t[r] = r < count ? _mm512_maskz_loadu_epi8(valid, from + r * stride) : _mm512_setzero_si512();
    if constexpr (Bits == 3 || Bits == 5 || Bits == 6 || Bits == 7) t[r] = expand<Bits>(t[r]);
  }
  transpose(t);
}

// Sixteen scales from element `at` on, divided by the steps; lanes that are not in the mask `valid` are zero.
QK_INLINE __m512 load_scales(const LowbitLinearCall& call, int64_t at, __mmask16 valid) {
  __m512 v;
  switch (call.scale_type) {
    case DType::bf16:
      v = _mm512_castsi512_ps(_mm512_slli_epi32(
          _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, static_cast<const uint16_t*>(call.scale) + at)), 16));
      break;
    case DType::f16:
      v = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, static_cast<const uint16_t*>(call.scale) + at));
      break;
    default:
      v = _mm512_maskz_loadu_ps(valid, static_cast<const float*>(call.scale) + at);
  }
  v = _mm512_maskz_max_ps(valid, _mm512_set1_ps(static_cast<float>(kMinScale)), v);  // the second operand if it is NaN
  return _mm512_div_ps(v, _mm512_set1_ps(static_cast<float>(call.steps)));
}

// Writes the scales of the sixteen weight rows from `row` on, [groups, 16], those beyond the block's rows as zeros.
// If `shift` is not null, it gets code_shift less the zero points in the same layout. Operands may be in units of 1 /
// per_code, a power of two.
inline void transpose_scales(const LowbitBlock& b, int64_t row, float* scale, float* shift, float code_shift,
                             float per_code = 1) {
  const LowbitLinearCall& call = b.plan.call;
  const int64_t rows = std::min<int64_t>(16, b.first_row + b.rows - row);
  const __m512 unit = _mm512_set1_ps(1 / per_code);
  const auto scales = [&](int64_t at, int64_t n) { return _mm512_mul_ps(load_scales(call, at, mask_lanes(n)), unit); };
  if (call.groups == 1 && !shift) return _mm512_store_ps(scale, scales(row, rows));
  for (int64_t g = 0; g < call.groups; g += 16) {
    const int64_t n = std::min<int64_t>(16, call.groups - g);
    __m512i t[16];
    for (int64_t r = 0; r < 16; ++r)
      t[r] = r < rows ? _mm512_castps_si512(scales((row + r) * call.groups + g, n)) : _mm512_setzero_si512();
    transpose(t);
    for (int64_t i = 0; i < n; ++i) _mm512_store_si512(scale + (g + i) * 16, t[i]);
    if (!shift) continue;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t r = 0; r < 16; ++r)
        shift[(g + i) * 16 + r] =
            per_code *
            (code_shift - (call.zero_point && r < rows ? call.zero_point[(row + r) * call.groups + g + i] : 0.0f));
  }
}

}  // namespace QK_ISA
}  // namespace qk
#endif
