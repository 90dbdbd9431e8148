// Counter-based Gaussian noise, the mirror of qatkernels/ops/noise.py: the same bits on every backend.
//
// U is uint32_t or a vector of it that provides multiply_wide(U, uint32_t, U& high, U& low), to_float, to_int and the
// bit casts as_float / as_uint; F the float of as many lanes. Compile without floating point contraction.
#pragma once

#include <cmath>
#include <cstring>

#include "grid.h"

namespace qk {

constexpr uint32_t kWeightStream = 0, kScaleStream = 1;

#if defined(__CUDACC__) || defined(QK_HOST_CUDA)
QK_HD void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}
QK_HD float to_float(uint32_t x) { return static_cast<float>(x); }
QK_HD uint32_t to_uint(float x) { return static_cast<uint32_t>(x); }
QK_HD float square_root(float x) { return sqrtf(x); }
QK_HD uint32_t as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
QK_HD float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
#endif

template <class U>
struct Words {
  U x0, x1, x2, x3;
};

template <class U>
QK_HD Words<U> philox(uint64_t seed, U counter_low, U counter_high, uint32_t stream) {
  Words<U> x{counter_low, counter_high, U(stream), U(0u)};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    U high0, low0, high1, low1;
    multiply_wide(x.x0, 0xD2511F53u, high0, low0);
    multiply_wide(x.x2, 0xCD9E8D57u, high1, low1);
    x = {high1 ^ x.x1 ^ U(k0), low1, high0 ^ x.x3 ^ U(k1), low0};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return x;
}

// Natural logarithm of u in (0, 1].
template <class F, class U>
QK_HD F log_of(F u) {
  const U bits = as_uint(u);
  F exponent = to_float(bits >> 23) - F(126.0f);
  F mantissa = as_float((bits & U(0x007FFFFFu)) | U(0x3F000000u));
  const auto small = mantissa < F(0.70710678118654752f);
  exponent = select(small, exponent - F(1.0f), exponent);
  const F t = select(small, mantissa + mantissa, mantissa) - F(1.0f);
  const F square = t * t;
  F y = F(7.0376836292e-2f);
  y = y * t + F(-1.1514610310e-1f);
  y = y * t + F(1.1676998740e-1f);
  y = y * t + F(-1.2420140846e-1f);
  y = y * t + F(1.4249322787e-1f);
  y = y * t + F(-1.6668057665e-1f);
  y = y * t + F(2.0000714765e-1f);
  y = y * t + F(-2.4999993993e-1f);
  y = y * t + F(3.3333331174e-1f);
  y = y * t * square;
  y = y + exponent * F(-2.12194440e-4f);
  y = y - square * F(0.5f);
  return (t + y) + exponent * F(0.693359375f);
}

// Two independent standard normals from two words.
template <class F, class U>
QK_HD void box_muller(U word0, U word1, F& normal0, F& normal1) {
  const F u = to_float((word0 >> 8) + U(1u)) * F(5.9604644775390625e-8f);
  const F radius = square_root(log_of<F, U>(u) * F(-2.0f));
  const F turn = to_float(word1 >> 8) * F(2.384185791015625e-7f);
  const U quadrant = to_uint(turn + F(0.5f));
  const F angle = (turn - to_float(quadrant)) * F(1.5707963267948966f);
  const F square = angle * angle;
  F sine = F(-1.9515295891e-4f);
  sine = sine * square + F(8.3321608736e-3f);
  sine = sine * square + F(-1.6666654611e-1f);
  sine = sine * square * angle + angle;
  F cosine = F(2.443315711809948e-5f);
  cosine = cosine * square + F(-1.388731625493765e-3f);
  cosine = cosine * square + F(4.166664568298827e-2f);
  cosine = (cosine * square * square - square * F(0.5f)) + F(1.0f);
  const auto odd = (quadrant & U(1u)) == U(1u);
  const F s = select(odd, cosine, sine), c = select(odd, sine, cosine);
  // The sign bit, set in quadrants 2, 3 for the sine and 1, 2 for the cosine.
  const F signed_sine = as_float(as_uint(s) ^ ((quadrant & U(2u)) << 30));
  const F signed_cosine = as_float(as_uint(c) ^ (((quadrant + U(1u)) & U(2u)) << 30));
  normal0 = radius * signed_cosine;
  normal1 = radius * signed_sine;
}

// Four normals: elements 4 * counter ... 4 * counter + 3 of a stream.
template <class F, class U>
QK_HD void four_normals(uint64_t seed, U counter_low, U counter_high, uint32_t stream, F (&z)[4]) {
  const Words<U> x = philox(seed, counter_low, counter_high, stream);
  box_muller<F, U>(x.x0, x.x1, z[0], z[1]);
  box_muller<F, U>(x.x2, x.x3, z[2], z[3]);
}

}  // namespace qk
