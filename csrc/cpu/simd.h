// Sixteen lanes of float, double or uint32_t, as one, two or four registers of whatever this ISA has.
//
// Always sixteen, so that sums are added in the same order and every ISA gives the same bits. Built on the vector
// extensions of GCC and Clang, with intrinsics only where the vector extensions cannot express the operation. Every
// such place has a portable branch; csrc/README.md says what a NEON port would fill.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "../common/grid.h"

// A function, or (after its parameter list) a lambda, that must become part of the caller's loop: compilers leave
// functions over many registers out of line, and then pass the registers through memory.
#define QK_INLINE inline __attribute__((always_inline))
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

// One register of T, or the part of a register that has as many elements as a register of wider ones. C casts between
// these types keep the bits.
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
  QK_INLINE Vec(T x) {
    for (Reg& p : part) p = x - Reg{};
  }

#define QK_BINARY(op)                                                    \
  friend QK_INLINE Vec operator op(const Vec& a, const Vec& b) {         \
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
  friend QK_INLINE Mask operator op(const Vec& a, const Vec& b) {        \
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
  QK_INLINE Vec operator-() const {
    Vec r;
    for (int i = 0; i < kCount; ++i) r.part[i] = -part[i];
    return r;
  }
  QK_INLINE Vec operator<<(int n) const {
    Vec r;
    for (int i = 0; i < kCount; ++i) r.part[i] = part[i] << n;
    return r;
  }
  QK_INLINE Vec operator>>(int n) const {
    Vec r;
    for (int i = 0; i < kCount; ++i) r.part[i] = part[i] >> n;
    return r;
  }
};

using F32 = Vec<float>;
using U32 = Vec<uint32_t>;

// mask ? a : b, lane by lane. The mask may come from another type with lanes of the same width.
template <class M, class T>
QK_INLINE Vec<T> select(const M& mask, const Vec<T>& a, const Vec<T>& b) {
  Vec<T> r;
  for (int i = 0; i < Vec<T>::kCount; ++i) r.part[i] = mask.part[i] ? a.part[i] : b.part[i];
  return r;
}

// Both return b where either is NaN.
template <class T>
QK_INLINE Vec<T> min_of(const Vec<T>& a, const Vec<T>& b) {
  Vec<T> r;
  for (int i = 0; i < Vec<T>::kCount; ++i) r.part[i] = a.part[i] < b.part[i] ? a.part[i] : b.part[i];
  return r;
}
template <class T>
QK_INLINE Vec<T> max_of(const Vec<T>& a, const Vec<T>& b) {
  Vec<T> r;
  for (int i = 0; i < Vec<T>::kCount; ++i) r.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return r;
}

// Adding and taking off a constant whose last place is 1 rounds to an integer. Right for magnitudes far below the
// constant; clamped values are.
QK_INLINE F32 round_half_even(const F32& x) { return (x + F32(12582912.0f)) - F32(12582912.0f); }
QK_INLINE Vec<double> round_half_even(const Vec<double>& x) {
  return (x + Vec<double>(6755399441055744.0)) - Vec<double>(6755399441055744.0);
}

template <class To, class From>
QK_INLINE Vec<To> bit_cast(const Vec<From>& x) {
  static_assert(sizeof(To) == sizeof(From), "lanes must match");
  Vec<To> r;
  for (int i = 0; i < Vec<To>::kCount; ++i) r.part[i] = (typename Vec<To>::Reg)x.part[i];
  return r;
}
QK_INLINE U32 as_uint(const F32& x) { return bit_cast<uint32_t>(x); }
QK_INLINE F32 as_float(const U32& x) { return bit_cast<float>(x); }

// For values below 2^31.
QK_INLINE F32 to_float(const U32& x) {
  F32 r;
  for (int i = 0; i < F32::kCount; ++i) r.part[i] = __builtin_convertvector((Register<int32_t>)x.part[i], F32::Reg);
  return r;
}
QK_INLINE U32 to_uint(const F32& x) {
  U32 r;
  for (int i = 0; i < F32::kCount; ++i) r.part[i] = (U32::Reg) __builtin_convertvector(x.part[i], Register<int32_t>);
  return r;
}

// a * b + c, rounded once where the ISA can.
QK_INLINE F32 multiply_add(const F32& a, const F32& b, const F32& c) {
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

// a * b + c, rounded once on every ISA. Before AVX2 it is computed in double and rounded twice, which gives the same
// unless the sum in double lies half way between two floats; tests/ops/test_noise.py tries all inputs of box_muller.
QK_INLINE F32 fused(const F32& a, const F32& b, const F32& c) {
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

QK_INLINE F32 square_root(const F32& x) {
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
QK_INLINE F32 exponential(const F32& x) {
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
QK_INLINE Vec<double> exponential(const Vec<double>& x) {
  Vec<double> r;
  for (int i = 0; i < kLanes; ++i) {
    constexpr int width = Vec<double>::kWidth;
    r.part[i / width][i % width] = std::exp(x.part[i / width][i % width]);
  }
  return r;
}

// The sum of all lanes: i and i + 8 are added first, then i and i + 4, i + 2, i + 1. One order on every ISA.
template <class R, int Half, int... I>
QK_INLINE R fold(R x, std::integer_sequence<int, I...>) {
  return x + __builtin_shufflevector(x, x, ((I + Half) % int(sizeof...(I)))...);
}
template <class T>
QK_INLINE T sum(Vec<T> x) {
  constexpr std::make_integer_sequence<int, Vec<T>::kWidth> lanes{};
  for (int half = Vec<T>::kCount / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x.part[i] = x.part[i] + x.part[i + half];
  auto r = x.part[0];
  if constexpr (Vec<T>::kWidth > 8) r = fold<decltype(r), 8>(r, lanes);
  if constexpr (Vec<T>::kWidth > 4) r = fold<decltype(r), 4>(r, lanes);
  if constexpr (Vec<T>::kWidth > 2) r = fold<decltype(r), 2>(r, lanes);
  return fold<decltype(r), 1>(r, lanes)[0];
}

// [a0, b0, a1, b1, ...] from the first half of each, and from the second.
template <class R, size_t... I>
QK_INLINE R interleave_low(R a, R b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I % 2 ? n + int(I) / 2 : int(I) / 2)...);
}
template <class R, size_t... I>
QK_INLINE R interleave_high(R a, R b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I % 2 ? n + n / 2 + int(I) / 2 : n / 2 + int(I) / 2)...);
}

}  // namespace QK_ISA
}  // namespace qk
