// Division of many numbers by the same one, correctly rounded, by multiplications. cuda/divide.h does the same, and
// says why it is exact.
#pragma once

#include "simd.h"

namespace qk {
namespace QK_ISA {

template <class T>
class Divisor {
 public:
  QK_INLINE explicit Divisor(T value) : value_(value) {}

  // The lanes of a, divided. If not AlsoTiny, a quotient of 0 < abs(a) < 2^-100 is only known to be below 2^-39, which
  // is enough to round it to a code.
  template <bool AlsoTiny>
  QK_INLINE Vec<T> divide(const Vec<T>& a) const {
    return a / Vec<T>(value_);
  }

 private:
  T value_;
};

#if defined(__AVX2__)  // which come with fused multiply-add
template <>
class Divisor<float> {
 public:
  // Outside this range the reciprocal is NaN, so that every quotient is NaN at first and then divided again.
  QK_INLINE explicit Divisor(float value)
      : value_(value), reciprocal_(value >= 0x1p-60f && value <= 0x1p20f ? 1 / value : __builtin_nanf("")) {}

  template <bool AlsoTiny>
  QK_INLINE F32 divide(const F32& a) const {
    const F32 y(reciprocal_), minus_b(-value_);
    F32 q = a * y;
    q = multiply_add(multiply_add(minus_b, q, a), y, q);
    q = multiply_add(multiply_add(minus_b, q, a), y, q);
    if (__builtin_expect(inexact<AlsoTiny>(a, q), false)) return a / F32(value_);
    return q;
  }

 private:
  // Whether a quotient is NaN, or a number so small that its remainder may have underflowed.
  template <bool AlsoTiny>
  static QK_INLINE bool inexact(const F32& a, const F32& q) {
    constexpr float tiny = 0x1p-100f;
#if defined(__AVX512F__)
    __mmask16 found = _mm512_cmp_ps_mask(q.part[0], q.part[0], _CMP_UNORD_Q);
    if constexpr (AlsoTiny) {
      const __mmask16 nonzero = _mm512_cmp_ps_mask(a.part[0], _mm512_setzero_ps(), _CMP_NEQ_OQ);
      found |= _mm512_mask_cmp_ps_mask(nonzero, _mm512_abs_ps(a.part[0]), _mm512_set1_ps(tiny), _CMP_LT_OQ);
    }
    return found != 0;
#else
    __m256 found = _mm256_setzero_ps();
    for (int i = 0; i < F32::kCount; ++i) {
      found = _mm256_or_ps(found, _mm256_cmp_ps(q.part[i], q.part[i], _CMP_UNORD_Q));
      if constexpr (AlsoTiny) {
        const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.part[i]);
        found = _mm256_or_ps(found, _mm256_and_ps(_mm256_cmp_ps(size, _mm256_setzero_ps(), _CMP_GT_OQ),
                                                  _mm256_cmp_ps(size, _mm256_set1_ps(tiny), _CMP_LT_OQ)));
      }
    }
    return _mm256_movemask_ps(found) != 0;
#endif
  }

  float value_, reciprocal_;
};
#endif

}  // namespace QK_ISA
}  // namespace qk
