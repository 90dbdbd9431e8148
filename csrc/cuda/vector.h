// V neighbouring elements that one instruction loads or stores, and their conversion to and from the computing type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace qk::cuda {

template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T lane[V];
};

template <int Bytes>
using Word = std::conditional_t<
    Bytes == 16, uint4,
    std::conditional_t<
        Bytes == 8, uint2,
        std::conditional_t<Bytes == 4, unsigned, std::conditional_t<Bytes == 2, unsigned short, unsigned char>>>>;

// Inputs are read once, so they are marked to be evicted from the L2 cache first, which leaves it to results.
template <int V, class T>
__device__ __forceinline__ Vector<T, V> load(const T* p) {
  using Bits = Word<sizeof(Vector<T, V>)>;
  const Bits bits = __ldcs(reinterpret_cast<const Bits*>(p));
  Vector<T, V> x;
  memcpy(static_cast<void*>(&x), &bits, sizeof x);
  return x;
}

// A result that the next kernel reads stays in the cache; one that is read much later (Streaming) bypasses it.
template <bool Streaming, class T, int V>
__device__ __forceinline__ void store(T* p, const Vector<T, V>& x) {
  using Bits = Word<sizeof(Vector<T, V>)>;
  Bits bits;
  memcpy(&bits, &x, sizeof bits);
  if constexpr (Streaming)
    __stcs(reinterpret_cast<Bits*>(p), bits);
  else
    *reinterpret_cast<Bits*>(p) = bits;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// One instruction rounds two elements.
__device__ __forceinline__ __half2 round_pair(float a, float b, __half) { return __floats2half2_rn(a, b); }
__device__ __forceinline__ __nv_bfloat162 round_pair(float a, float b, __nv_bfloat16) {
  return __floats2bfloat162_rn(a, b);
}

template <class Y, class T, int V>
__device__ __forceinline__ Vector<Y, V> narrow(const T (&x)[V]) {
  Vector<Y, V> y;
  if constexpr (sizeof(Y) == 2 && V % 2 == 0) {
#pragma unroll
    for (int j = 0; j < V; j += 2) {
      const auto pair = round_pair(x[j], x[j + 1], Y());
      memcpy(static_cast<void*>(&y.lane[j]), &pair, sizeof pair);
    }
  } else if constexpr (std::is_same_v<Y, __nv_bfloat16>) {
    y.lane[0] = __float2bfloat16_rn(x[0]);
  } else if constexpr (std::is_same_v<Y, __half>) {
    y.lane[0] = __float2half_rn(x[0]);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) y.lane[j] = x[j];
  }
  return y;
}

}  // namespace qk::cuda
