// Sixteen lanes of float, double or uint32_t, as one, two or four registers of whatever this ISA has.
//
// Always sixteen, so that sums are added in the same order and every ISA gives the same bits. Built on the vector
// extensions of GCC and Clang; intrinsics only where those have no word for it.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "../common/grid.h"

// After the parameter list of a lambda whose body belongs inside the caller's loop.
#define QK_INLINE_LAMBDA __attribute__((always_inline))

namespace qk {
namespace QK_ISA {

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// One register of T, or the part of one that matches a register of wider elements. C casts between them keep the bits.
template <class T, int Bytes = kRegisterBytes>
using Register __attribute__((vector_size(Bytes))) = T;

template <class T>
struct Signed;
template <>
struct Signed<float> {
  using type = int32_t;
};
template <>
struct Signed<double> {
  using type = int64_t;
};
template <>
struct Signed<uint32_t> {
  using type = int32_t;
};

template <class T>
struct Vec {
  using Scalar = T;
  using Reg = Register<T>;
  using Bits = Register<typename Signed<T>::type>;
  static constexpr int kWidth = kRegisterBytes / sizeof(T);
  static constexpr int kCount = kLanes / kWidth;

  struct Mask {
    Bits part[kCount];
  };

  Reg part[kCount];

  Vec() = default;
  QK_HD Vec(T x) {
    for (Reg& p : part) p = x - Reg{};
  }

#define QK_BINARY(op)                                                    \
  friend QK_HD Vec operator op(const Vec& a, const Vec& b) {             \
    Vec r;                                                               \
    for (int i = 0; i < kCount; ++i) r.part[i] = a.part[i] op b.part[i]; \
    return r;                                                            \
  }
  QK_BINARY(+)
  QK_BINARY(-)
  QK_BINARY(*)
  QK_BINARY(/)
  QK_BINARY(&)
  QK_BINARY(|)
  QK_BINARY(^)
#undef QK_BINARY
#define QK_COMPARE(op)                                                   \
  friend QK_HD Mask operator op(const Vec& a, const Vec& b) {            \
    Mask r;                                                              \
    for (int i = 0; i < kCount; ++i) r.part[i] = a.part[i] op b.part[i]; \
    return r;                                                            \
  }
  QK_COMPARE(<)
  QK_COMPARE(>)
  QK_COMPARE(<=)
  QK_COMPARE(>=)
  QK_COMPARE(==)
  QK_COMPARE(!=)
#undef QK_COMPARE
  QK_HD Vec operator-() const {
    Vec r;
    for (int i = 0; i < kCount; ++i) r.part[i] = -part[i];
    return r;
  }
  QK_HD Vec operator<<(int n) const {
    Vec r;
    for (int i = 0; i < kCount; ++i) r.part[i] = part[i] << n;
    return r;
  }
  QK_HD Vec operator>>(int n) const {
    Vec r;
    for (int i = 0; i < kCount; ++i) r.part[i] = part[i] >> n;
    return r;
  }
};

using F32 = Vec<float>;
using U32 = Vec<uint32_t>;

// The mask may come from another type of as wide lanes.
template <class M, class T>
QK_HD Vec<T> select(const M& mask, const Vec<T>& a, const Vec<T>& b) {
  Vec<T> r;
  for (int i = 0; i < Vec<T>::kCount; ++i) r.part[i] = mask.part[i] ? a.part[i] : b.part[i];
  return r;
}

// Both return b where either is NaN.
template <class T>
QK_HD Vec<T> min_of(const Vec<T>& a, const Vec<T>& b) {
  Vec<T> r;
  for (int i = 0; i < Vec<T>::kCount; ++i) r.part[i] = a.part[i] < b.part[i] ? a.part[i] : b.part[i];
  return r;
}
template <class T>
QK_HD Vec<T> max_of(const Vec<T>& a, const Vec<T>& b) {
  Vec<T> r;
  for (int i = 0; i < Vec<T>::kCount; ++i) r.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return r;
}

// For magnitudes far below the constant, which a clamped value is.
QK_HD F32 round_half_even(const F32& x) { return (x + F32(12582912.0f)) - F32(12582912.0f); }
QK_HD Vec<double> round_half_even(const Vec<double>& x) {
  return (x + Vec<double>(6755399441055744.0)) - Vec<double>(6755399441055744.0);
}

template <class To, class From>
QK_HD Vec<To> bit_cast(const Vec<From>& x) {
  static_assert(sizeof(To) == sizeof(From), "lanes must match");
  Vec<To> r;
  for (int i = 0; i < Vec<To>::kCount; ++i) r.part[i] = (typename Vec<To>::Reg)x.part[i];
  return r;
}
QK_HD U32 as_uint(const F32& x) { return bit_cast<uint32_t>(x); }
QK_HD F32 as_float(const U32& x) { return bit_cast<float>(x); }

// For values below 2^31.
QK_HD F32 to_float(const U32& x) {
  F32 r;
  for (int i = 0; i < F32::kCount; ++i) r.part[i] = __builtin_convertvector((Register<int32_t>)x.part[i], F32::Reg);
  return r;
}
QK_HD U32 to_uint(const F32& x) {
  U32 r;
  for (int i = 0; i < F32::kCount; ++i) r.part[i] = (U32::Reg) __builtin_convertvector(x.part[i], Register<int32_t>);
  return r;
}

// a * b + c, rounded once where the ISA can.
QK_HD F32 multiply_add(const F32& a, const F32& b, const F32& c) {
  F32 r;
  for (int i = 0; i < F32::kCount; ++i) {
#if defined(__AVX512F__)
    r.part[i] = _mm512_fmadd_ps(a.part[i], b.part[i], c.part[i]);
#elif defined(__AVX2__)
    r.part[i] = _mm256_fmadd_ps(a.part[i], b.part[i], c.part[i]);
#else
    r.part[i] = a.part[i] * b.part[i] + c.part[i];
#endif
  }
  return r;
}

// a * b + c rounded once. Before AVX2 by way of double, which is the same only where no sum lies half way between two
// floats as a double: tests/ops/test_noise.py tries all of box_muller's.
QK_HD F32 fused(const F32& a, const F32& b, const F32& c) {
#if defined(__AVX2__)
  return multiply_add(a, b, c);
#else
  F32 r;
  for (int i = 0; i < F32::kCount; ++i) {
#if defined(__x86_64__)
    const auto half = [](__m128 x, __m128 y, __m128 z) {
      return _mm_cvtpd_ps(_mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(x), _mm_cvtps_pd(y)), _mm_cvtps_pd(z)));
    };
    const auto upper = [](__m128 x) { return _mm_movehl_ps(x, x); };
    const __m128 x = a.part[i], y = b.part[i], z = c.part[i];
    r.part[i] = _mm_movelh_ps(half(x, y, z), half(upper(x), upper(y), upper(z)));
#else
    for (int j = 0; j < F32::kWidth; ++j) r.part[i][j] = double(a.part[i][j]) * b.part[i][j] + c.part[i][j];
#endif
  }
  return r;
#endif
}

QK_HD F32 square_root(const F32& x) {
  F32 r;
  for (int i = 0; i < F32::kCount; ++i) {
#if defined(__AVX512F__)
    r.part[i] = _mm512_sqrt_ps(x.part[i]);
#elif defined(__AVX2__)
    r.part[i] = _mm256_sqrt_ps(x.part[i]);
#else
    for (int j = 0; j < F32::kWidth; ++j) r.part[i][j] = std::sqrt(x.part[i][j]);
#endif
  }
  return r;
}

// e^x for x <= 88, to two units in the last place; 0 where the result would be subnormal. NaN stays.
QK_HD F32 exponential(const F32& x) {
  const F32 low(-87.3f), high(88.0f);
  const F32 clamped = min_of(high, max_of(low, x));
  const F32 n = round_half_even(clamped * F32(1.44269504088896341f));
  const F32 r = (clamped - n * F32(0.693359375f)) - n * F32(-2.12194440e-4f);
  F32 y = F32(1.9875691500e-4f) * r + F32(1.3981999507e-3f);
  y = y * r + F32(8.3334519073e-3f);
  y = y * r + F32(4.1665795894e-2f);
  y = y * r + F32(1.6666665459e-1f);
  y = y * r + F32(5.0000001201e-1f);
  y = (y * (r * r) + r) + F32(1.0f);
  const F32 power = as_float(to_uint(n + F32(127.0f)) << 23);
  return select(x < low, F32(0.0f), y * power);
}
QK_HD Vec<double> exponential(const Vec<double>& x) {
  Vec<double> r;
  for (int i = 0; i < kLanes; ++i) {
    constexpr int width = Vec<double>::kWidth;
    r.part[i / width][i % width] = std::exp(x.part[i / width][i % width]);
  }
  return r;
}

// Lanes i and i + 8, then i and i + 4, 2, 1: one order on every ISA.
template <class R, int Half, int... I>
QK_HD R fold(R x, std::integer_sequence<int, I...>) {
  return x + __builtin_shufflevector(x, x, ((I + Half) % int(sizeof...(I)))...);
}
template <class T>
QK_HD T sum(Vec<T> x) {
  constexpr std::make_integer_sequence<int, Vec<T>::kWidth> lanes{};
  for (int half = Vec<T>::kCount / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x.part[i] = x.part[i] + x.part[i + half];
  auto r = x.part[0];
  if constexpr (Vec<T>::kWidth > 8) r = fold<decltype(r), 8>(r, lanes);
  if constexpr (Vec<T>::kWidth > 4) r = fold<decltype(r), 4>(r, lanes);
  if constexpr (Vec<T>::kWidth > 2) r = fold<decltype(r), 2>(r, lanes);
  return fold<decltype(r), 1>(r, lanes)[0];
}

// ---- loads and stores of any element type as lanes of the computing type

// A register at a time: compilers split one copy of several into narrower ones by way of memory.
template <class T>
QK_HD Vec<T> load(const T* p) {
  Vec<T> r;
  for (int i = 0; i < Vec<T>::kCount; ++i) std::memcpy(&r.part[i], p + i * Vec<T>::kWidth, kRegisterBytes);
  return r;
}
template <class T>
QK_HD void store(T* p, const Vec<T>& x) {
  for (int i = 0; i < Vec<T>::kCount; ++i) std::memcpy(p + i * Vec<T>::kWidth, &x.part[i], kRegisterBytes);
}

// Sixteen-bit elements to the lanes of one register, and the high halves of lanes to such elements; compilers take
// detours here.
using Half = Register<uint16_t, kRegisterBytes / 2>;

QK_HD U32::Reg widen(Half h) {
#if defined(__AVX512F__)
  return (U32::Reg)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (U32::Reg)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, U32::Reg);
#endif
}
QK_HD void store_high(bfloat16* p, const U32& x) {
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

QK_HD F32 load(const bfloat16* p) {
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
QK_HD void store(bfloat16* p, const F32& x) {
  U32 rounded;
  for (int i = 0; i < F32::kCount; ++i) {
    const U32::Reg bits = (U32::Reg)x.part[i];
    rounded.part[i] = x.part[i] == x.part[i] ? bits + 0x7FFFu + ((bits >> 16) & 1u) : bits | 0x400000u;
  }
  store_high(p, rounded);
}

// Of zero, normal numbers and NaN only, which is what dequantized values are: the instruction flushes subnormals.
QK_HD void store_normal(bfloat16* p, const F32& x) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(x.part[0]);
  std::memcpy(p, &h, sizeof h);
#else
  store(p, x);
#endif
}
// Of values that were loaded from this type.
QK_HD void store_exact(bfloat16* p, const F32& x) { store_high(p, as_uint(x)); }

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
  if (magnitude < 0x38800000u) {                                               // subnormal: let the adder round
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

QK_HD F32 load(const float16* p) {
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
QK_HD void store(float16* p, const F32& x) {
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
QK_HD void store_normal(T* p, const V& x) {
  store(p, x);
}
template <class T, class V>
QK_HD void store_exact(T* p, const V& x) {
  store(p, x);
}

// float32 lanes as the computing type, for the noise.
QK_HD void widen(const F32& x, F32& out) { out = x; }
QK_HD void widen(const F32& x, Vec<double>& out) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) out.part[i / Vec<double>::kWidth][i % Vec<double>::kWidth] = lanes[i];
}

// One register of float64 lanes from elements, and back, rounded.
using WideRegister = Vec<double>::Reg;
QK_HD WideRegister load_wide(const double* p) {
  WideRegister r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
QK_HD WideRegister load_wide(const float* p) {
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
QK_HD WideRegister load_wide(const bfloat16* p) {
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
QK_HD void store(double* p, WideRegister x) { std::memcpy(p, &x, sizeof x); }
QK_HD void store(float* p, WideRegister x) {
#if defined(__AVX512F__)
  _mm256_storeu_ps(p, _mm512_cvtpd_ps(x));
#else
  const auto half = __builtin_convertvector(x, Register<float, kRegisterBytes / 2>);
  std::memcpy(p, &half, sizeof half);
#endif
}

// The first n < 16 elements, the other lanes 0.
template <class T>
QK_HD auto load_first(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(static_cast<const T*>(lanes));
}
// Copies sixteen elements past the caches: p aligned to their size. Saves reading the lines about to be overwritten.
template <class T>
QK_HD void stream(T* p, const T* lanes) {
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
