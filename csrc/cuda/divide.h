// Division of many numbers by one, correctly rounded, without a reciprocal and a branch for each.
//
// With y = RN(1 / b), q within one ulp of a / b and the remainder a - b * q exact, RN(q + y * (a - b * q)) is RN(a / b)
// (Markstein, 1990). a * y is within two ulps, one step more brings it within one. The remainder is exact unless it
// underflows, which takes abs(a) < 2^-100; an overflow or an infinite or NaN operand ends in NaN. Both are then divided
// again.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace qk::cuda {

template <class T>
struct Divisor {
  T value, reciprocal;

  // Outside this range the reciprocal is NaN, and so is every quotient at first.
  __device__ __forceinline__ explicit Divisor(T b)
      : value(b), reciprocal(b >= T(0x1p-60) && b <= T(0x1p20) ? T(1) / b : T(NAN)) {}

  // q = a / value. If not AlsoTiny, where 0 < abs(a) < 2^-100 q is only known to be below 2^-39: all that rounding
  // asks.
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
