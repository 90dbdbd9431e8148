// Gaussian noise from a counter-based generator, the mirror of qatkernels/ops/noise.py: the same bits on every backend.
//
// U is uint32_t or a vector of it, F float or a vector of as many lanes. They provide to_float, square_root, fused
// (a * b + c, rounded once) and the bit casts as_float and as_uint. Must be compiled without floating-point
// contraction.
#pragma once

#include <cmath>
#include <cstring>

#include "grid.h"

namespace qk {

constexpr uint32_t kWeightStream = 0, kScaleStream = 1;

constexpr int kRounds = 7;
constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kIncrement0 = 0x9E3779B9u, kIncrement1 = 0xBB67AE85u;

#if defined(__CUDACC__) || defined(QK_HOST_CUDA)
QK_HOST_DEVICE void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}
QK_HOST_DEVICE float to_float(uint32_t x) { return static_cast<float>(x); }
QK_HOST_DEVICE float square_root(float x) { return sqrtf(x); }
QK_HOST_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
QK_HOST_DEVICE uint32_t as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
QK_HOST_DEVICE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

struct Words {
  uint32_t x0, x1, x2, x3;
};

QK_HOST_DEVICE Words philox(uint64_t seed, uint32_t counter_low, uint32_t counter_high, uint32_t stream) {
  Words x{counter_low, counter_high, stream, 0u};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    uint32_t high0, low0, high1, low1;
    multiply_wide(x.x0, kMultiplier0, high0, low0);
    multiply_wide(x.x2, kMultiplier1, high1, low1);
    x = {high1 ^ x.x1 ^ k0, low1, high0 ^ x.x3 ^ k1, low0};
    k0 += kIncrement0;
    k1 += kIncrement1;
  }
  return x;
}
#endif

// Two independent standard normals from a word: its top bit and bit 10 are their signs, bits 11 to 30 give the radius,
// the rest the angle. The radius is sqrt(-2 ln u) with 2^31 u = v, an odd multiple of 2^10. The bits of v as a float,
// divided by 2^23, are 127 + log2 v with log2 interpolated linearly between powers of two; a polynomial in h corrects
// the interpolation. All of this is scaled by 2^23.
template <class F, class U>
QK_HOST_DEVICE void box_muller(U word, F& normal0, F& normal1) {
  const U bits = as_uint(to_float((word & U(0x7FFFF800u)) | U(0x400u)));
  const F h = as_float((bits & U(0x007FFFFFu)) | U(0x3F800000u)) - F(1.5f);
  F y = F(216773.6875f);
  y = fused(y, h, F(-371393.53125f));
  y = fused(y, h, F(644046.875f));
  y = fused(y, h, F(-1280924.125f));
  y = fused(y, h, F(2850889.75f));
  const F radius = square_root(fused(fused(h, h, F(-0.25f)), y, to_float(U(0x4F000000u) - bits)));
  const F x = as_float(((word << 13) & U(0x007FE000u)) | U(0x40000000u)) - F(2.9990234375f);
  const F square = x * x;
  F even = F(-9.166328e-8f);
  even = fused(even, square, F(4.5561155e-6f));
  even = fused(even, square, F(-8.8657667e-5f));
  even = fused(even, square, F(2.8745361e-4f));
  F odd = F(6.976795e-7f);
  odd = fused(odd, square, F(-2.320153e-5f));
  odd = fused(odd, square, F(2.2576441e-4f));
  normal0 = as_float(as_uint(radius * fused(odd, -x, even)) ^ (word & U(0x80000000u)));
  normal1 = as_float(as_uint(radius * fused(odd, x, even)) ^ ((word << 21) & U(0x80000000u)));
}

}  // namespace qk
