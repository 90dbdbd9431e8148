// Activations as rows of int8, in the order of the operands of tensor-core products.
//
// With act_bits a token is one activation row: its symmetric integers. Without, it is three, the limbs to the base 256,
// from -128 to 127, of its values as integers of 23 bits and a sign, in a unit that is a power of two. The largest
// value of the token sets the unit: an error is at most 2^-22.9 of the largest, and bfloat16 down to 2^-14 of it,
// float16 down to 2^-11 of it are exact. Sums of products are then integers, exact in any order.
//
// Non-finite values: a token with NaN gives NaN. An infinite one with act_bits gives NaN, as its scale says; without,
// it becomes plus or minus one where it is infinite and 0 elsewhere, times an infinite unit, which gives the infinity
// or NaN that the product has.
#pragma once

#include <cfloat>

#include "lowbit_layout.h"
#include "ptx.h"
#include "quant_weight.h"

namespace qk::cuda {

struct LowbitLimbs {
  const void* x;  // of the first token
  uint4* out;     // [stages][products / 2][activation rows][4 lanes]
  float* unit;    // [tokens]
  int64_t cols;
  int32_t tokens, bits, act_bits, stages, pieces, limbs;
};

__device__ __forceinline__ int32_t magnitude_bits(float x) { return __float_as_int(x) & 0x7FFFFFFF; }
constexpr int32_t kInfinityBits = 0x7F800000;

// The largest magnitude of a row, as the bits of a float: they compare as the magnitudes do, and NaN is the largest.
template <class X, int V>
__device__ __forceinline__ int32_t largest(const X* row, int64_t cols) {
  constexpr int kUnroll = 4;
  int32_t largest_bits = 0;
  for (int64_t first = int64_t{threadIdx.x} * V; first < cols; first += int64_t{kThreads} * V * kUnroll) {
    Vector<X, V> in[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t col = first + int64_t{u} * kThreads * V;
      if (col < cols) {
        in[u] = load<V>(row + col);
      } else {
#pragma unroll
        for (int j = 0; j < V; ++j) memset(static_cast<void*>(&in[u].lane[j]), 0, sizeof(X));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int j = 0; j < V; ++j) largest_bits = max(largest_bits, magnitude_bits(widen(in[u].lane[j])));
  }
  return over_lanes(largest_bits, kThreads, [](int32_t a, int32_t b) { return max(a, b); });
}

// The unit of a token, and how its values become integers.
struct LimbScale {
  float unit, multiplier;  // with act_bits values are divided by the unit, else multiplied
  float qmax;
  bool infinite;

  __device__ __forceinline__ LimbScale(int32_t largest_bits, int act_bits) {
    infinite = false;
    multiplier = 0;
    qmax = static_cast<float>((1 << (act_bits ? act_bits - 1 : 1)) - 1);
    if (act_bits) {
      const float step = __int_as_float(largest_bits) / qmax;
      unit = step < FLT_MIN ? FLT_MIN : step;
      if (largest_bits >= kInfinityBits) unit = NAN;
      return;
    }
    if (largest_bits >= kInfinityBits) {
      infinite = largest_bits == kInfinityBits;
      unit = __int_as_float(infinite ? kInfinityBits : 0x7FC00000);
      return;
    }
    // The largest times 2^power has 23 bits; 22 if with 23 its top limb could be 128, which int8 does not hold.
    const int exponent = (largest_bits >> 23) - 127;
    int power = 22 - exponent - ((largest_bits & 0x7FFFFF) > 0x7EFEFE);
    power = min(power, 126);
    multiplier = __int_as_float((power + 127) << 23);
    unit = __int_as_float((127 - power) << 23);
  }

  __device__ __forceinline__ int32_t integer(float x) const {
    if (infinite) return magnitude_bits(x) == kInfinityBits ? (x > 0 ? 1 : -1) : 0;
    if (!(unit == unit)) return 0;
    if (multiplier != 0) return static_cast<int32_t>(rintf(x * multiplier));
    return static_cast<int32_t>(rintf(min_of(qmax, max_of(-qmax, x / unit))));
  }
};

// A block for each piece of a token: a thread writes 16 columns of the token's activation rows at a time.
template <class X, int V>
__global__ void __launch_bounds__(kThreads) lowbit_limbs_kernel(LowbitLimbs p) {
  let_dependents_start();
  const int token = static_cast<int>(blockIdx.x) / p.pieces, piece = static_cast<int>(blockIdx.x) % p.pieces;
  const X* const row = static_cast<const X*>(p.x) + token * p.cols;
  const LimbScale scale(largest<X, V>(row, p.cols), p.act_bits);
  if (piece == 0 && threadIdx.x == 0) p.unit[token] = scale.unit;

  const LowbitLayout layout(p.bits);
  const int granule_products = layout.products / layout.granules;
  const int64_t items = int64_t{p.stages} * layout.products * 2;
  for (int64_t item = int64_t{piece} * kThreads + threadIdx.x; item < items; item += int64_t{p.pieces} * kThreads) {
    const int lane = static_cast<int>(item % 4);
    const int64_t pair = item / 4;
    uint32_t out[3][4] = {};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t product = 2 * pair + r / 2;
      const int64_t first = product / granule_products * layout.granule_cols;
      const int in_granule = static_cast<int>(product % granule_products) * 2 + r % 2;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t col = first + layout.col(lane, in_granule, j);
        int32_t value = col < p.cols ? scale.integer(widen(row[col])) : 0;
#pragma unroll
        for (int d = 0; d < 3; ++d) {
          const int32_t limb = static_cast<int8_t>(value);
          out[d][r] |= static_cast<uint32_t>(limb & 0xFF) << 8 * j;
          value = (value - limb) >> 8;
        }
      }
    }
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      if (d >= p.limbs) break;
      uint4 operands;
      operands.x = out[d][0];
      operands.y = out[d][1];
      operands.z = out[d][2];
      operands.w = out[d][3];
      p.out[(pair * p.tokens * p.limbs + token * p.limbs + d) * 4 + lane] = operands;
    }
  }
}

inline cudaError_t lowbit_limbs(const LowbitLimbs& p, DType type, cudaStream_t stream) {
  return with_types(type, type, [&](auto types) {
    using X = typename decltype(types)::W;
    if constexpr (sizeof(X) == 8) {
      return cudaErrorInvalidValue;
    } else {
      return with_vector<X>(
          p.cols,
          [&](auto v) {
            return launch(lowbit_limbs_kernel<X, v>, int64_t{p.tokens} * p.pieces, kThreads, 0, stream, p);
          },
          static_cast<const X*>(p.x));
    }
  });
}

}  // namespace qk::cuda
