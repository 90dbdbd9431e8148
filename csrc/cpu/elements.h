// Loads and stores: elements in memory (float32, float64, bfloat16, float16) to and from sixteen lanes of float or
// double.
#pragma once

#include "simd.h"

namespace qk {
namespace QK_ISA {

// One memcpy per register: compilers split a copy of several registers into narrower copies through memory.
template <class T>
QK_INLINE Vec<T> load(const T* p) {
  Vec<T> r;
  for (int i = 0; i < Vec<T>::kCount; ++i) std::memcpy(&r.part[i], p + i * Vec<T>::kWidth, kRegisterBytes);
  return r;
}
template <class T>
QK_INLINE void store(T* p, const Vec<T>& x) {
  for (int i = 0; i < Vec<T>::kCount; ++i) std::memcpy(p + i * Vec<T>::kWidth, &x.part[i], kRegisterBytes);
}

// Widens sixteen-bit elements to the lanes of one register, and narrows the high halves of lanes back. With intrinsics,
// because compilers generate slow code for it.
using Half = Register<uint16_t, kRegisterBytes / 2>;

QK_INLINE U32::Reg widen(Half h) {
#if defined(__AVX512F__)
  return (U32::Reg)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (U32::Reg)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, U32::Reg);
#endif
}
QK_INLINE void store_high(bfloat16* p, const U32& x) {
#if defined(__AVX512F__)
  const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)x.part[0], 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
#elif defined(__AVX2__)
  const auto high = [](U32::Reg part) { return _mm256_srai_epi32((__m256i)part, 16); };
  const __m256i halves = _mm256_packs_epi32(high(x.part[0]), high(x.part[1]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(halves, 0xD8));
#elif defined(__x86_64__)
  const auto high = [](U32::Reg part) { return _mm_srai_epi32((__m128i)part, 16); };
  for (int i = 0; i < U32::kCount; i += 2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i * U32::kWidth),
                     _mm_packs_epi32(high(x.part[i]), high(x.part[i + 1])));
#else
  for (int i = 0; i < U32::kCount; ++i) {
    const Half halves = __builtin_convertvector(x.part[i] >> 16, Half);
    std::memcpy(p + i * U32::kWidth, &halves, sizeof halves);
  }
#endif
}

QK_INLINE F32 load(const bfloat16* p) {
  F32 r;
  for (int i = 0; i < F32::kCount; ++i) {
    Half h;
    std::memcpy(&h, p + i * F32::kWidth, sizeof h);
    const U32::Reg wide = widen(h) << 16;
    r.part[i] = (F32::Reg)wide;
  }
  return r;
}

// Round to nearest even; a NaN stays one.
QK_INLINE void store(bfloat16* p, const F32& x) {
  U32 rounded;
  for (int i = 0; i < F32::kCount; ++i) {
    const U32::Reg bits = (U32::Reg)x.part[i];
    rounded.part[i] = x.part[i] == x.part[i] ? bits + 0x7FFFu + ((bits >> 16) & 1u) : bits | 0x400000u;
  }
  store_high(p, rounded);
}

// Only for zeros, normal numbers and NaN, which dequantized values are: the instruction flushes subnormals to zero.
QK_INLINE void store_normal(bfloat16* p, const F32& x) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(x.part[0]);
  std::memcpy(p, &h, sizeof h);
#else
  store(p, x);
#endif
}
// Only for values that this type represents exactly, such as those that were loaded from it.
QK_INLINE void store_exact(bfloat16* p, const F32& x) { store_high(p, as_uint(x)); }

#if !defined(__F16C__)
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
  uint32_t bits;
  if (magnitude >= 0x7C00u) {
    bits = 0x7F800000u | (magnitude & 0x3FFu) << 13;
  } else if (magnitude >= 0x0400u) {
    bits = (magnitude << 13) + (112u << 23);
  } else {
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&bits, &value, sizeof bits);
  }
  bits |= sign;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u | (magnitude >> 13 & 0x3FFu));
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {                                               // subnormal: adding 0.5 rounds
    float shifted;
    const uint32_t absolute = magnitude;
    std::memcpy(&shifted, &absolute, sizeof shifted);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000u));
  }
  return static_cast<uint16_t>(sign | (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13);
}
#endif

QK_INLINE F32 load(const float16* p) {
  F32 r;
#if defined(__AVX512F__)
  r.part[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  for (int i = 0; i < F32::kCount; ++i)
    r.part[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
#else
  for (int i = 0; i < kLanes; ++i) r.part[i / F32::kWidth][i % F32::kWidth] = half_to_float(p[i].bits);
#endif
  return r;
}
QK_INLINE void store(float16* p, const F32& x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.part[0], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  for (int i = 0; i < F32::kCount; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i), _mm256_cvtps_ph(x.part[i], _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(x.part[i / F32::kWidth][i % F32::kWidth]);
#endif
}

template <class T, class V>
QK_INLINE void store_normal(T* p, const V& x) {
  store(p, x);
}
template <class T, class V>
QK_INLINE void store_exact(T* p, const V& x) {
  store(p, x);
}

// float32 lanes as the computing type, for the noise.
QK_INLINE void widen(const F32& x, F32& out) { out = x; }
QK_INLINE void widen(const F32& x, Vec<double>& out) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) out.part[i / Vec<double>::kWidth][i % Vec<double>::kWidth] = lanes[i];
}

// One register of float64 lanes from elements of any type, and back, rounded.
using WideRegister = Vec<double>::Reg;
QK_INLINE WideRegister load_wide(const double* p) {
  WideRegister r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
QK_INLINE WideRegister load_wide(const float* p) {
#if defined(__AVX512F__)
  return (WideRegister)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(__AVX2__)
  return (WideRegister)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  Register<float, kRegisterBytes / 2> half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, WideRegister);
#endif
}
QK_INLINE WideRegister load_wide(const bfloat16* p) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (WideRegister)_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
#elif defined(__AVX2__)
  const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return (WideRegister)_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
#else
  float lanes[Vec<double>::kWidth];
  for (int i = 0; i < Vec<double>::kWidth; ++i) {
    const uint32_t bits = static_cast<uint32_t>(p[i].bits) << 16;
    std::memcpy(&lanes[i], &bits, sizeof bits);
  }
  return load_wide(static_cast<const float*>(lanes));
#endif
}
QK_INLINE void store(double* p, WideRegister x) { std::memcpy(p, &x, sizeof x); }
QK_INLINE void store(float* p, WideRegister x) {
#if defined(__AVX512F__)
  _mm256_storeu_ps(p, _mm512_cvtpd_ps(x));
#else
  const auto half = __builtin_convertvector(x, Register<float, kRegisterBytes / 2>);
  std::memcpy(p, &half, sizeof half);
#endif
}

// The first n < 16 elements; the other lanes are 0.
template <class T>
QK_INLINE auto load_first(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(static_cast<const T*>(lanes));
}
// Copies sixteen elements to memory past the caches, to save reading the cache lines that they overwrite. p is aligned
// to the size of the sixteen.
template <class T>
QK_INLINE void stream(T* p, const T* lanes) {
#if defined(__x86_64__)
  constexpr size_t bytes = kLanes * sizeof(T), step = bytes < kRegisterBytes ? bytes : kRegisterBytes;
  for (size_t i = 0; i < bytes; i += step) {
    const char* const from = reinterpret_cast<const char*>(lanes) + i;
    char* const to = reinterpret_cast<char*>(p) + i;
#if defined(__AVX512F__)
    if constexpr (step == 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
    else
#endif
#if defined(__AVX2__)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
  }
#else
  std::memcpy(p, lanes, kLanes * sizeof(T));
#endif
}

inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace QK_ISA
}  // namespace qk
