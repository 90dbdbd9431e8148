// Packed words in the lanes of AVX-512 registers, and the factors that go with their rows.
#pragma once

#include "lowbit.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
namespace qk {
namespace QK_ISA {

// Sixteen times sixteen 32-bit elements, in place.
QK_HD void transpose(__m512i t[16]) {
  __m512i a[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(t[i], t[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(t[i], t[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    t[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    t[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    t[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    t[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xDD);
    a[i + 8] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xDD);
    t[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xDD);
  }
}

QK_HD __mmask64 first_bytes(int64_t n) { return n >= 64 ? ~__mmask64{0} : n <= 0 ? 0 : (__mmask64{1} << n) - 1; }

// Words number 16 * chunk and on of sixteen rows (fewer give zeros): word w of row r in lane r of t[w].
template <int Bits>
QK_HD void load_words(const uint8_t* rows, int64_t stride, int64_t count, int64_t chunk, __m512i t[16]) {
  constexpr int64_t bytes = chunk_codes(Bits) * Bits / 8;
  const uint8_t* const from = rows + chunk * bytes;
  const __mmask64 valid = first_bytes(std::min(bytes, stride - chunk * bytes));
  for (int64_t r = 0; r < 16; ++r) {
    t[r] = r < count ? _mm512_maskz_loadu_epi8(valid, from + r * stride) : _mm512_setzero_si512();
    if constexpr (Bits == 3 || Bits == 5 || Bits == 6 || Bits == 7) t[r] = expand<Bits>(t[r]);
  }
  transpose(t);
}

// Sixteen scales, as many as `valid` says, divided by the steps.
QK_HD __m512 scales_at(const LowbitLinearCall& call, int64_t at, __mmask16 valid) {
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
QK_HD __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1); }

// The factors of each group for the sixteen rows from `row` on, [groups, 16]: scales, and `base` less the zero points
// unless `rest` is null.
inline void gather_factors(const RowBlock& b, int64_t row, float* scale, float* rest, float base) {
  const LowbitLinearCall& call = b.call;
  const int64_t rows = std::min<int64_t>(16, b.first_row + b.rows - row);
  if (call.groups == 1 && !rest) return _mm512_store_ps(scale, scales_at(call, row, first_lanes(rows)));
  for (int64_t g = 0; g < call.groups; g += 16) {
    const int64_t n = std::min<int64_t>(16, call.groups - g);
    __m512i t[16];
    for (int64_t r = 0; r < 16; ++r)
      t[r] = r < rows ? _mm512_castps_si512(scales_at(call, (row + r) * call.groups + g, first_lanes(n)))
                      : _mm512_setzero_si512();
    transpose(t);
    for (int64_t i = 0; i < n; ++i) _mm512_store_si512(scale + (g + i) * 16, t[i]);
    if (!rest) continue;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t r = 0; r < 16; ++r)
        rest[(g + i) * 16 + r] =
            base - (call.zero_point && r < rows ? call.zero_point[(row + r) * call.groups + g + i] : 0.0f);
  }
}

}  // namespace QK_ISA
}  // namespace qk
#endif
