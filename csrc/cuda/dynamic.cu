// Dynamic quantization of activations on a GPU: each token gets its scale from its largest magnitude. Memory is read
// once where a token fits into registers.
#include <cfloat>

#include "dynamic.h"
#include "quant_weight.h"

namespace qk::cuda {

namespace {

constexpr int kInFlight = 4;  // vectors of a thread

// Magnitudes are compared as the integers that their bits are; NaN is then the largest.
__device__ __forceinline__ int32_t magnitude(float x) { return __float_as_int(x) & 0x7FFFFFFF; }
__device__ __forceinline__ int64_t magnitude(double x) { return __double_as_longlong(x) & 0x7FFFFFFFFFFFFFFF; }
__device__ __forceinline__ float from_magnitude(int32_t bits) { return __int_as_float(bits); }
__device__ __forceinline__ double from_magnitude(int64_t bits) { return __longlong_as_double(bits); }

}  // namespace

template <class T, class X, int V, bool Long>
__global__ void __launch_bounds__(kThreads, kBlocks)
    fake_quantize_dynamic_kernel(TileLayout layout, const X* x, X* y, T qmax) {
  using Bits = decltype(magnitude(T()));
  const Tile<V, kInFlight, Long> tile(layout);

  Bits largest[tile.kRows] = {};
  const auto look = [&](int64_t col, const Vector<X, V>(&in)[kInFlight]) {
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (!tile.holds(col, k)) continue;
#pragma unroll
      for (int j = 0; j < V; ++j)
        largest[Long ? 0 : k] = max(largest[Long ? 0 : k], magnitude(T(widen(in[k].lane[j]))));
    }
  };

  Vector<X, V> first[kInFlight], in[kInFlight];
  tile.read(x, tile.begin, first);
  look(tile.begin, first);
  for (int64_t col = tile.begin + tile.step; col < tile.end; col += tile.step) {
    tile.read(x, col, in);
    look(col, in);
  }

  T scale[tile.kRows];
#pragma unroll
  for (int k = 0; k < tile.kRows; ++k) {
    const Bits bits = over_lanes(largest[k], tile.lanes, [](Bits a, Bits b) { return max(a, b); });
    const T step = from_magnitude(bits) / qmax;
    scale[k] = step < T(FLT_MIN) ? T(FLT_MIN) : step;
  }

  const auto write = [&](int64_t col, const Vector<X, V>(&in)[kInFlight]) {
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (!tile.holds(col, k)) continue;
      const Divisor<T> divisor(scale[Long ? 0 : k]);
      T value[V], r[V];
#pragma unroll
      for (int j = 0; j < V; ++j) value[j] = widen(in[k].lane[j]);
      divisor.template divide<false>(value, r);
#pragma unroll
      for (int j = 0; j < V; ++j)
        value[j] = (round_half_even(min_of(qmax, max_of(-qmax, r[j]))) + T(0)) * divisor.value;
      store<false>(y + tile.index(col, k), narrow<X>(value));
    }
  };
  write(tile.begin, first);
  for (int64_t col = tile.begin + tile.step; col < tile.end; col += tile.step) {
    tile.read(x, col, in);
    write(col, in);
  }
}

cudaError_t fake_quantize_dynamic(const FakeQuantizeDynamicCall& call, cudaStream_t stream) {
  if (call.rows * call.cols == 0) return cudaSuccess;
  return with_types(call.type, call.type, [&](auto types) {
    using T = typename decltype(types)::T;
    using X = typename decltype(types)::W;
    const X* const x = static_cast<const X*>(call.x);
    X* const y = static_cast<X*>(call.y);
    const T qmax = T((1 << (call.bits - 1)) - 1);
    const auto start = [&](auto v) {
      const TileLayout layout(call.rows, call.cols, v, kInFlight, false);
      return with_bool(layout.is_long, [&](auto long_) {
        return launch(fake_quantize_dynamic_kernel<T, X, v, long_>, layout.blocks(), kThreads, 0, stream, layout, x, y,
                      qmax);
      });
    };
    return with_vector<X>(call.cols, start, x, y);
  });
}

}  // namespace qk::cuda
