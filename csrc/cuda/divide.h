// Division of many numbers by the same one, correctly rounded, without the reciprocal and the branch that the
// compiler's division has for each.
//
// With y = RN(1 / b), q within one ulp of a / b and the remainder a - b * q exact, RN(q + y * (a - b * q)) is RN(a / b)
// (Markstein, 1990). a * y is within two ulps; one such step brings it within one, a second makes it exact. The
// remainder is exact unless it underflows, which takes abs(a) < 2^-100; an overflow, an infinite or a NaN operand ends
// in NaN. In these two cases the vector is divided again by ordinary divisions.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace qk::cuda {

template <class T>
struct Divisor {
  T value, reciprocal;

  // Outside this range of b the reciprocal is NaN, so that every quotient is NaN at first and then divided again.
  __device__ __forceinline__ explicit Divisor(T b)
      : value(b), reciprocal(b >= T(0x1p-60) && b <= T(0x1p20) ? T(1) / b : T(NAN)) {}

  // q = a / value. If not AlsoTiny, a quotient of 0 < abs(a) < 2^-100 is only known to be below 2^-39, which is enough
  // to round it to a code.
  template <bool AlsoTiny, int V>
  __device__ __forceinline__ void divide(const T (&a)[V], T (&q)[V]) const {
    if constexpr (sizeof(T) == 8) {
#pragma unroll
      for (int j = 0; j < V; ++j) q[j] = a[j] / value;
    } else {
      bool again = false;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        q[j] = a[j] * reciprocal;
        q[j] = fmaf(fmaf(-value, q[j], a[j]), reciprocal, q[j]);
        q[j] = fmaf(fmaf(-value, q[j], a[j]), reciprocal, q[j]);
        again |= q[j] != q[j];
        if (AlsoTiny) again |= fabsf(a[j]) < 0x1p-100f && a[j] != 0;
      }
      if (again) {
#pragma unroll
        for (int j = 0; j < V; ++j) q[j] = a[j] / value;
      }
    }
  }
};

}  // namespace qk::cuda
