// Counter-based Gaussian noise, the mirror of qatkernels/ops/noise.py: the same bits on every backend.
//
// U is uint32_t or a vector of it that provides to_float, square_root and the bit casts as_float / as_uint; F the float
// of as many lanes. Compile without floating point contraction.
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

constexpr int kRounds = 7;
constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kIncrement0 = 0x9E3779B9u, kIncrement1 = 0xBB67AE85u;

#if defined(__CUDACC__) || defined(QK_HOST_CUDA)
QK_HD Words<uint32_t> philox(uint64_t seed, uint32_t counter_low, uint32_t counter_high, uint32_t stream) {
  Words<uint32_t> x{counter_low, counter_high, stream, 0u};
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

// Two independent standard normals from a word.
template <class F, class U>
QK_HD void box_muller(U word, F& normal0, F& normal1) {
  const U bits = as_uint(to_float((word >> 11) | U(1u)));
  const F t = as_float((bits & U(0x007FFFFFu)) | U(0x3F800000u)) - F(1.0f);
  F y = F(-0.025827002f);
  y = y * t + F(0.12175208f);
  y = y * t + F(-0.27785026f);
  y = y * t + F(0.4575183f);
  y = y * t + F(-0.7181374f);
  y = y * t + F(1.4425443f);
  const F radius = square_root(F(148.0f) - to_float(bits >> 23) - y * t);
  const F x = to_float(word & U(0x3FFu)) * F(1.953125e-3f) + F(-0.9990234375f);
  const F square = x * x;
  F even = F(-2.6458118e-4f);
  even = even * square + F(1.3194540e-2f);
  even = even * square + F(-2.5677956e-1f);
  even = even * square + F(8.3255461e-1f);
  F odd = F(2.0202000e-3f);
  odd = odd * square + F(-6.7198100e-2f);
  odd = odd * square + F(6.5388336e-1f);
  odd = odd * x;
  // The sign bits are bits 11 and 10.
  normal0 = as_float(as_uint(radius * (even - odd)) ^ ((word << 20) & U(0x80000000u)));
  normal1 = as_float(as_uint(radius * (even + odd)) ^ ((word << 21) & U(0x80000000u)));
}

}  // namespace qk
