// Packed codes to bytes and to float32 values, on any ISA.
#pragma once

#include <algorithm>

#include "../common/grid.h"
#include "../common/lowbit_linear.h"
#include "../common/packing.h"
#include "elements.h"

namespace qk {
namespace QK_ISA {

// Calls f with the bit width as a compile-time constant.
template <class F>
inline void with_bits(int bits, F f) {
  switch (bits) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 5:
      return f(std::integral_constant<int, 5>());
    case 6:
      return f(std::integral_constant<int, 6>());
    case 7:
      return f(std::integral_constant<int, 7>());
    default:
      return f(std::integral_constant<int, 8>());
  }
}

#if defined(__AVX512BW__)
// 64 packed codes, in the first 8 * Bits bytes of the register, to one code a byte.
template <int Bits>
QK_INLINE __m512i expand(__m512i bytes) {
  if constexpr (Bits == 8) return bytes;
#if defined(__AVX512VBMI__)
  alignas(64) static constexpr auto source = [] {
    struct {
      uint8_t at[64];
    } t{};
    for (int i = 0; i < 64; ++i) t.at[i] = static_cast<uint8_t>(i / 8 * Bits + i % 8);
    return t;
  }();
  constexpr uint64_t shifts = [] {
    uint64_t s = 0;
    for (int i = 0; i < 8; ++i) s |= static_cast<uint64_t>(i * Bits) << 8 * i;
    return s;
  }();
  // First each eight-byte lane gets the bytes that hold its eight codes, then each byte the bits of its code.
  const __m512i lanes = _mm512_permutexvar_epi8(_mm512_load_si512(source.at), bytes);
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<long long>(shifts)), lanes),
                          _mm512_set1_epi8((1 << Bits) - 1));
#else
  // First each sixteen-byte lane gets the bytes that hold its sixteen codes. Then each 16-bit element gets the two
  // bytes that hold a code: those of even codes in one register, of odd codes in another.
  alignas(64) static constexpr auto tables = [] {
    struct {
      uint16_t source[32];
      uint8_t window[2][64];
      uint16_t shift[2][32];
    } t{};
    for (int i = 0; i < 32; ++i) t.source[i] = static_cast<uint16_t>((i / 8 * Bits + i % 8) % 32);
    for (int odd = 0; odd < 2; ++odd)
      for (int i = 0; i < 32; ++i) {
        const int bit = (i % 8 * 2 + odd) * Bits;
        t.window[odd][2 * i] = static_cast<uint8_t>(bit / 8);
        t.window[odd][2 * i + 1] = static_cast<uint8_t>(bit / 8 + 1);
        t.shift[odd][i] = static_cast<uint16_t>(bit % 8);
      }
    return t;
  }();
  const __m512i lanes = _mm512_permutexvar_epi16(_mm512_load_si512(tables.source), bytes);
  const auto codes = [&](int odd) QK_INLINE_LAMBDA {
    return _mm512_srlv_epi16(_mm512_shuffle_epi8(lanes, _mm512_load_si512(tables.window[odd])),
                             _mm512_load_si512(tables.shift[odd]));
  };
  return _mm512_and_si512(_mm512_mask_blend_epi8(0xAAAAAAAAAAAAAAAA, codes(0), _mm512_slli_epi16(codes(1), 8)),
                          _mm512_set1_epi8((1 << Bits) - 1));
#endif
}
#endif

// Writes `count` unsigned codes of a row, one a byte, from code `first` on. `first` is a multiple of eight. May write
// up to 63 bytes beyond.
template <int Bits>
inline void unpack_codes(const uint8_t* row, int64_t first, int64_t count, uint8_t* out) {
  const uint8_t* const from = row + first / 8 * Bits;
  int64_t i = 0;
#if defined(__AVX512BW__)
  constexpr __mmask64 all = Bits == 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * Bits % 64)) - 1;
  for (; i + 64 <= count; i += 64)
    _mm512_storeu_si512(out + i, expand<Bits>(_mm512_maskz_loadu_epi8(all, from + i / 8 * Bits)));
#else
  for (; i + 8 <= count; i += 8) {
    uint64_t v = 0;
    std::memcpy(&v, from + i / 8 * Bits, Bits);
    v = spread(v, Bits);
    std::memcpy(out + i, &v, 8);
  }
#endif
  for (; i < count; i += 8) {
    uint64_t v = 0;
    const int64_t left = count - i < 8 ? count - i : 8;
    std::memcpy(&v, from + i / 8 * Bits, static_cast<size_t>(row_bytes(left, Bits)));
    v = spread(v, Bits);
    std::memcpy(out + i, &v, 8);
  }
}

// Sixteen bytes to lanes.
QK_INLINE U32 bytes_to_uint(Register<uint8_t, 16> bytes) {
  U32 r;
#if defined(__AVX512F__)
  r.part[0] = (U32::Reg)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
  r.part[0] = (U32::Reg)_mm256_cvtepu8_epi32((__m128i)bytes);
  r.part[1] = (U32::Reg)_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)bytes, 8));
#else
  for (int i = 0; i < kLanes; ++i) r.part[i / U32::kWidth][i % U32::kWidth] = bytes[i];
#endif
  return r;
}

// Sixteen bytes to float32 lanes.
QK_INLINE F32 bytes_to_float(const uint8_t* p) {
  Register<uint8_t, 16> bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return to_float(bytes_to_uint(bytes));
}

// Calls f with p as a pointer to elements of the type.
template <class Void, class F>
void with_float(DType type, Void* p, F f) {
  const auto as = [p]<class T>(T) { return static_cast<std::conditional_t<std::is_const_v<Void>, const T, T>*>(p); };
  switch (type) {
    case DType::bf16:
      return f(as(bfloat16()));
    case DType::f16:
      return f(as(float16()));
    default:
      return f(as(float()));
  }
}

// Element i of an array of float32, bfloat16 or float16.
inline float read_float(const void* p, DType type, int64_t i) {
  alignas(64) float lanes[kLanes];
  switch (type) {
    case DType::f32:
      return static_cast<const float*>(p)[i];
    case DType::bf16:
      store(lanes, load_first(static_cast<const bfloat16*>(p) + i, 1));
      return lanes[0];
    default:
      store(lanes, load_first(static_cast<const float16*>(p) + i, 1));
      return lanes[0];
  }
}

// What one code is worth in a group of a row: its scale, at least kMinScale, divided by the steps.
inline float step_of(const LowbitLinearCall& call, int64_t row, int64_t group) {
  constexpr float min_scale = static_cast<float>(kMinScale);
  const float scale = read_float(call.scale, call.scale_type, row * call.groups + group);
  return (scale < min_scale ? min_scale : scale) / static_cast<float>(call.steps);  // NaN stays
}

constexpr int64_t kDequantizeSpan = 512;  // codes that are dequantized at once, a multiple of 64

// Writes the values of codes [first, first + count) of a row (counted over all experts). `first` is a multiple of
// eight, count at most kDequantizeSpan. May write up to 15 floats beyond.
inline void dequantize_span(const LowbitLinearCall& call, int64_t row, int64_t first, int64_t count, float* out) {
  uint8_t bytes[kDequantizeSpan + 64];
  with_bits(call.bits, [&](auto bits) {
    unpack_codes<bits>(call.packed + row * row_bytes(call.cols, bits), first, count, bytes);
  });
  const int64_t group_cols = call.cols / call.groups;
  const F32 low(static_cast<float>(call.code_min));
  for (int64_t i = 0; i < count;) {
    const int64_t group = (first + i) / group_cols, end = std::min(count, (group + 1) * group_cols - first);
    float offset = static_cast<float>(call.offset);
    if (call.zero_point) offset -= call.zero_point[row * call.groups + group];
    const F32 step(step_of(call, row, group));
    for (; i < end; i += kLanes) store(out + i, (bytes_to_float(bytes + i) + low + F32(offset)) * step);
    i = end;  // values beyond the group are overwritten by the next one
  }
}

}  // namespace QK_ISA
}  // namespace qk
