// Weights to integer codes and back on a GPU.
#include "quant_weight.h"
#include "quantize.h"

namespace qk::cuda {

constexpr int kInFlight = 4;  // vectors of a thread

template <class T, class W, bool Zero, int V, bool Long>
__global__ void __launch_bounds__(kThreads, kBlocks)
    quantize_kernel(QuantWeight<T> weight, TileLayout layout, uint8_t* codes, int32_t code_min, int32_t code_max) {
  const W* const w = static_cast<const W*>(weight.w);
  const T low = code_min, high = code_max;
  const Tile<V, kInFlight, Long> tile(layout);
  Vector<W, V> in[kInFlight];
  RowScale<T> scales[tile.kRows];
  tile.read(w, tile.begin, in);
  weight.template read<Zero>(tile, scales);
  const ScaledRow<T> first = weight.template row<false>(scales[0], tile.row(0));
  for (int64_t col = tile.begin; col < tile.end; col += tile.step) {
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (!tile.holds(col, k)) continue;
      const int64_t at = tile.index(col, k);
      const ScaledRow<T> row = Long || k == 0 ? first : weight.template row<false>(scales[k], tile.row(k));
      T x[V], r[V];
      weight.template values<false>(in[k], at, x);
      row.divisor.template divide<false>(x, r);
      Vector<uint8_t, V> out;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const T code = code_of(x[j], r[j], row);
        const T clamped = code == code ? min_of(high, max_of(low, code)) : min_of(high, max_of(low, T(0)));
        out.lane[j] = static_cast<uint8_t>(static_cast<int32_t>(clamped));
      }
      store<false>(codes + at, out);
    }
    if constexpr (Long) tile.read(w, col + tile.step, in);
  }
}

// sign is 128 for int8 codes and 0 for uint8 codes: (byte ^ sign) - sign is the code.
template <class T, class Y, bool Zero, int V, bool Long>
__global__ void __launch_bounds__(kThreads, kBlocks)
    dequantize_kernel(QuantWeight<T> weight, TileLayout layout, const uint8_t* codes, int32_t sign, Y* y) {
  const Tile<V, kInFlight, Long> tile(layout);
  Vector<uint8_t, V> in[kInFlight];
  RowScale<T> scales[tile.kRows];
  tile.read(codes, tile.begin, in);
  weight.template read<Zero>(tile, scales);
  const ScaledRow<T> first = weight.template row<false>(scales[0], tile.row(0));
  for (int64_t col = tile.begin; col < tile.end; col += tile.step) {
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (!tile.holds(col, k)) continue;
      const ScaledRow<T> row = Long || k == 0 ? first : weight.template row<false>(scales[k], tile.row(k));
      T x[V];
#pragma unroll
      for (int j = 0; j < V; ++j) x[j] = value_of(static_cast<T>((in[k].lane[j] ^ sign) - sign), row);
      store<false>(y + tile.index(col, k), narrow<Y>(x));
    }
    if constexpr (Long) tile.read(codes, col + tile.step, in);
  }
}

namespace {

// Calls f(zero, v, long, layout) with what the kernel for these rows is compiled for; Wide is the element type of the
// widest tensor.
template <class Wide, class F, class... Pointers>
cudaError_t with_rows(const QuantArgs& args, F f, Pointers... pointers) {
  if (args.rows * args.cols == 0) return cudaSuccess;
  const auto start = [&](auto v) {
    const TileLayout layout(args.rows, args.cols, v, kInFlight, true);
    return with_bool(args.zero_point, [&](auto zero) {
      return with_bool(layout.is_long, [&](auto long_) { return f(zero, v, long_, layout); });
    });
  };
  return with_vector<Wide>(args.cols, start, pointers...);
}

}  // namespace

cudaError_t quantize(const QuantizeCall& call, cudaStream_t stream) {
  return with_types(call.args.w_type, call.args.w_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using W = typename decltype(types)::W;
    const auto start = [&](auto zero, auto v, auto long_, const TileLayout& layout) {
      return launch(quantize_kernel<T, W, zero, v, long_>, layout.blocks(), kThreads, 0, stream,
                    QuantWeight<T>(call.args), layout, static_cast<uint8_t*>(call.codes), call.code_min, call.code_max);
    };
    return with_rows<W>(call.args, start, static_cast<const W*>(call.args.w), static_cast<const uint8_t*>(call.codes));
  });
}

cudaError_t dequantize(const DequantizeCall& call, cudaStream_t stream) {
  return with_types(call.y_type, call.y_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using Y = typename decltype(types)::Y;
    const uint8_t* const codes = static_cast<const uint8_t*>(call.codes);
    Y* const y = static_cast<Y*>(call.y);
    const auto start = [&](auto zero, auto v, auto long_, const TileLayout& layout) {
      return launch(dequantize_kernel<T, Y, zero, v, long_>, layout.blocks(), kThreads, 0, stream,
                    QuantWeight<T>(call.args), layout, codes, call.codes_unsigned ? 0 : 128, y);
    };
    return with_rows<Y>(call.args, start, codes, y);
  });
}

}  // namespace qk::cuda
