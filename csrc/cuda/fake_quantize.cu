// Fake quantization of weights on a GPU: forward, backward and forward-mode derivative, each one pass over memory.
#include "fake_quantize.h"
#include "quant_weight.h"

namespace qk::cuda {

// Vectors that a thread has in flight. 64 bytes hide the latency of memory at half occupancy; with noise, which is
// bound by arithmetic, fewer do.
__host__ __device__ constexpr int in_flight(int operands, bool noise) { return (noise ? 2 : 4) / operands; }

template <class Types, bool Noise, bool Zero, int V, bool Long>
__global__ void __launch_bounds__(kThreads, kBlocks)
    fake_quantize_kernel(QuantWeight<typename Types::T> weight, TileLayout layout, typename Types::Y* y) {
  using T = typename Types::T;
  using W = typename Types::W;
  using Y = typename Types::Y;
  constexpr int U = in_flight(1, Noise);
  const W* const w = static_cast<const W*>(weight.w);
  const Tile<V, U, Long> tile(layout);
  Vector<W, V> in[U];
  RowScale<T> scales[tile.kRows];
  tile.read(w, tile.begin, in);
  weight.template read<Zero>(tile, scales);
  const ScaledRow<T> first = weight.template row<Noise>(scales[0], tile.row(0));
  for (int64_t col = tile.begin; col < tile.end; col += tile.step) {
#pragma unroll
    for (int k = 0; k < U; ++k) {
      if (!tile.holds(col, k)) continue;
      const int64_t at = tile.index(col, k);
      const ScaledRow<T> row = Long || k == 0 ? first : weight.template row<Noise>(scales[k], tile.row(k));
      T x[V], r[V];
      weight.template values<Noise>(in[k], at, x);
      row.divisor.template divide<false>(x, r);
#pragma unroll
      for (int j = 0; j < V; ++j) x[j] = value_of(code_of(x[j], r[j], row), row);
      store<false>(y + at, narrow<Y>(x));
    }
    if constexpr (Long) tile.read(w, col + tile.step, in);
  }
}

// Where the backward writes.
template <class T>
struct FakeQuantizeGradients {
  void *dw, *ds, *dz;
  T* partial;  // [rows, pieces, 2] where rows are cut

  __device__ __forceinline__ void write(int64_t row, const QuantWeight<T>& weight, T sum_s, T sum_z) const {
    write_scalar(ds, weight.wide, row, sum_s * weight.grad_scale);
    if (dz) write_scalar(dz, weight.wide, row, sum_z * weight.grad_scale);
  }
};

template <class Types, bool Noise, bool Zero, int V, bool Long>
__global__ void __launch_bounds__(kThreads, kBlocks)
    fake_quantize_backward_kernel(QuantWeight<typename Types::T> weight, TileLayout layout, const typename Types::Y* g,
                                  FakeQuantizeGradients<typename Types::T> out) {
  using T = typename Types::T;
  using W = typename Types::W;
  using Y = typename Types::Y;
  constexpr int U = in_flight(2, Noise);
  const W* const w = static_cast<const W*>(weight.w);
  const Tile<V, U, Long> tile(layout);
  Vector<W, V> in[U];
  Vector<Y, V> upstream[U];
  RowScale<T> scales[tile.kRows];
  tile.read(w, tile.begin, in);
  tile.read(g, tile.begin, upstream);
  weight.template read<Zero>(tile, scales);
  const ScaledRow<T> first = weight.template row<Noise>(scales[0], tile.row(0));
  T sum_s[tile.kRows] = {}, sum_z[tile.kRows] = {};
  for (int64_t col = tile.begin; col < tile.end; col += tile.step) {
#pragma unroll
    for (int k = 0; k < U; ++k) {
      if (!tile.holds(col, k)) continue;
      const int64_t at = tile.index(col, k);
      const ScaledRow<T> row = Long || k == 0 ? first : weight.template row<Noise>(scales[k], tile.row(k));
      T x[V], r[V];
      weight.template values<Noise>(in[k], at, x);
      row.divisor.template divide<true>(x, r);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const Slopes<T, T> slopes(x[j], r[j], row);
        const T gradient = widen(upstream[k].lane[j]);
        x[j] = slopes.masked(gradient);
        sum_s[Long ? 0 : k] += gradient * slopes.scale;
        if constexpr (Zero) sum_z[Long ? 0 : k] += gradient * slopes.zero_point;
      }
      store<true>(static_cast<W*>(out.dw) + at, narrow<W>(x));
    }
    if constexpr (Long) {
      tile.read(w, col + tile.step, in);
      tile.read(g, col + tile.step, upstream);
    }
  }
  const auto add = [](T a, T b) { return a + b; };
#pragma unroll
  for (int k = 0; k < tile.kRows; ++k) {
    const T total_s = over_lanes(sum_s[k], tile.lanes, add);
    const T total_z = Zero ? over_lanes(sum_z[k], tile.lanes, add) : T(0);
    if (tile.lane != 0 || !tile.has_row(k)) continue;
    if (!Long || layout.pieces == 1) {
      out.write(tile.row(k), weight, total_s, total_z);
    } else {
      T* const partial = out.partial + 2 * (tile.row(k) * layout.pieces + tile.piece);
      partial[0] = total_s;
      partial[1] = total_z;
    }
  }
}

// Adds the pieces of a row, a block for each row. The order depends on the number of pieces alone.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    fake_quantize_backward_finish_kernel(QuantWeight<T> weight, int64_t pieces, FakeQuantizeGradients<T> out) {
  const int64_t row = blockIdx.x;
  double sum_s = 0, sum_z = 0;
  for (int64_t piece = threadIdx.x; piece < pieces; piece += kThreads) {
    const T* const partial = out.partial + 2 * (row * pieces + piece);
    sum_s += partial[0];
    sum_z += partial[1];
  }
  const auto add = [](double a, double b) { return a + b; };
  sum_s = over_lanes(sum_s, kThreads, add);
  sum_z = over_lanes(sum_z, kThreads, add);
  if (threadIdx.x == 0) out.write(row, weight, static_cast<T>(sum_s), static_cast<T>(sum_z));
}

template <class Types, bool Noise, bool Zero, int V, bool Long>
__global__ void __launch_bounds__(kThreads, kBlocks)
    fake_quantize_jvp_kernel(QuantWeight<typename Types::T> weight, TileLayout layout,
                             const typename Types::W* tangent_w, const void* tangent_scale,
                             const void* tangent_zero_point, typename Types::Y* y) {
  using T = typename Types::T;
  using W = typename Types::W;
  using Y = typename Types::Y;
  constexpr int U = in_flight(2, Noise);
  const W* const w = static_cast<const W*>(weight.w);
  const Tile<V, U, Long> tile(layout);
  Vector<W, V> in[U], tangent[U];
  RowScale<T> scales[tile.kRows], tangents[tile.kRows];
  tile.read(w, tile.begin, in);
  if (tangent_w) tile.read(tangent_w, tile.begin, tangent);
  weight.template read<Zero>(tile, scales);
#pragma unroll
  for (int k = 0; k < tile.kRows; ++k) {
    tangents[k] = {0, 0};
    if (tangent_scale) read_scalar(tangent_scale, weight.wide, tile.row(k), tangents[k].scale);
    if (Zero && tangent_zero_point) read_scalar(tangent_zero_point, weight.wide, tile.row(k), tangents[k].zero);
  }
  const ScaledRow<T> first = weight.template row<Noise>(scales[0], tile.row(0));
  for (int64_t col = tile.begin; col < tile.end; col += tile.step) {
#pragma unroll
    for (int k = 0; k < U; ++k) {
      if (!tile.holds(col, k)) continue;
      const int64_t at = tile.index(col, k);
      const ScaledRow<T> row = Long || k == 0 ? first : weight.template row<Noise>(scales[k], tile.row(k));
      const T along_s = tangents[Long ? 0 : k].scale * weight.grad_scale;
      const T along_z = tangents[Long ? 0 : k].zero * weight.grad_scale;
      T x[V], r[V];
      weight.template values<Noise>(in[k], at, x);
      row.divisor.template divide<true>(x, r);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const Slopes<T, T> slopes(x[j], r[j], row);
        x[j] = tangent_w ? slopes.masked(widen(tangent[k].lane[j])) : T(0);
        // A tangent that is absent is not added as 0: 0 times a NaN slope would be NaN.
        if (tangent_scale) x[j] += slopes.scale * along_s;
        if (Zero && tangent_zero_point) x[j] += slopes.zero_point * along_z;
      }
      store<false>(y + at, narrow<Y>(x));
    }
    if constexpr (Long) {
      tile.read(w, col + tile.step, in);
      if (tangent_w) tile.read(tangent_w, col + tile.step, tangent);
    }
  }
}

namespace {

// Calls f(noise, zero, long) with the booleans of a call as compile-time constants.
template <class F>
cudaError_t with_flags(const QuantArgs& args, bool is_long, F f) {
  return with_bool(is_noisy(args), [&](auto noise) {
    return with_bool(args.zero_point,
                     [&](auto zero) { return with_bool(is_long, [&](auto long_) { return f(noise, zero, long_); }); });
  });
}

}  // namespace

cudaError_t fake_quantize(const FakeQuantizeCall& call, cudaStream_t stream) {
  const QuantArgs& args = call.args;
  const int u = in_flight(1, is_noisy(args));
  if (args.rows * args.cols == 0) return cudaSuccess;
  return with_types(args.w_type, call.y_type, [&](auto types) {
    using Ts = decltype(types);
    auto* const y = static_cast<typename Ts::Y*>(call.y);
    const auto start = [&](auto v) {
      const TileLayout layout(args.rows, args.cols, v, u, true);
      return with_flags(args, layout.is_long, [&](auto noise, auto zero, auto long_) {
        return launch(fake_quantize_kernel<Ts, noise, zero, v, long_>, layout.blocks(), kThreads, 0, stream,
                      QuantWeight<typename Ts::T>(args), layout, y);
      });
    };
    return with_vector<typename Ts::W>(args.cols, start, static_cast<const typename Ts::W*>(args.w), y);
  });
}

namespace {

// Calls f(types, v, layout) with what the backward kernel of a call is compiled for.
template <class F>
cudaError_t with_backward(const FakeQuantizeBackwardCall& call, F f) {
  const int u = in_flight(2, is_noisy(call.args));
  return with_types(call.args.w_type, call.g_type, [&](auto types) {
    using Ts = decltype(types);
    const auto start = [&](auto v) { return f(types, v, TileLayout(call.args.rows, call.args.cols, v, u, true)); };
    return with_vector<typename Ts::W>(call.args.cols, start, static_cast<const typename Ts::W*>(call.args.w),
                                       static_cast<const typename Ts::Y*>(call.g),
                                       static_cast<const typename Ts::W*>(call.dw));
  });
}

}  // namespace

size_t fake_quantize_backward_workspace(const FakeQuantizeBackwardCall& call) {
  size_t bytes = 0;
  with_backward(call, [&](auto types, auto, const TileLayout& layout) {
    if (layout.pieces > 1) bytes = 2 * layout.rows * layout.pieces * sizeof(typename decltype(types)::T);
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t fake_quantize_backward(const FakeQuantizeBackwardCall& call, void* workspace, cudaStream_t stream) {
  const QuantArgs& args = call.args;
  if (args.rows * args.cols == 0) {
    const size_t bytes = args.rows * (args.scale_type == DType::f64 ? sizeof(double) : sizeof(float));
    const cudaError_t error = cudaMemsetAsync(call.ds, 0, bytes, stream);
    return error || !call.dz ? error : cudaMemsetAsync(call.dz, 0, bytes, stream);
  }
  return with_backward(call, [&](auto types, auto v, const TileLayout& layout) {
    using Ts = decltype(types);
    using T = typename Ts::T;
    const QuantWeight<T> weight(args);
    const FakeQuantizeGradients<T> out{call.dw, call.ds, call.dz, static_cast<T*>(workspace)};
    const cudaError_t error = with_flags(args, layout.is_long, [&](auto noise, auto zero, auto long_) {
      return launch(fake_quantize_backward_kernel<Ts, noise, zero, v, long_>, layout.blocks(), kThreads, 0, stream,
                    weight, layout, static_cast<const typename Ts::Y*>(call.g), out);
    });
    if (error || layout.pieces == 1) return error;
    return launch(fake_quantize_backward_finish_kernel<T>, args.rows, kThreads, 0, stream, weight, layout.pieces, out);
  });
}

cudaError_t fake_quantize_jvp(const FakeQuantizeJvpCall& call, cudaStream_t stream) {
  const QuantArgs& args = call.args;
  const int u = in_flight(2, is_noisy(args));
  if (args.rows * args.cols == 0) return cudaSuccess;
  return with_types(args.w_type, call.y_type, [&](auto types) {
    using Ts = decltype(types);
    auto* const y = static_cast<typename Ts::Y*>(call.y);
    const auto* const tangent_w = static_cast<const typename Ts::W*>(call.tangent_w);
    const auto start = [&](auto v) {
      const TileLayout layout(args.rows, args.cols, v, u, true);
      return with_flags(args, layout.is_long, [&](auto noise, auto zero, auto long_) {
        return launch(fake_quantize_jvp_kernel<Ts, noise, zero, v, long_>, layout.blocks(), kThreads, 0, stream,
                      QuantWeight<typename Ts::T>(args), layout, tangent_w, call.tangent_scale, call.tangent_zero_point,
                      y);
      });
    };
    return with_vector<typename Ts::W>(args.cols, start, static_cast<const typename Ts::W*>(args.w), tangent_w, y);
  });
}

}  // namespace qk::cuda
