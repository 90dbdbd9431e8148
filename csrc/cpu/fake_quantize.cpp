// Fake quantization of weights on the CPU: forward, backward and forward-mode derivative, each one pass over memory.
#include "fake_quantize.h"

#include <algorithm>

#include "divide.h"
#include "rows.h"

namespace qk {
namespace QK_ISA {

void fake_quantize(const FakeQuantizeCall& call, int64_t begin, int64_t end) {
  with_types(call.args.w_type, call.y_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using W = typename decltype(types)::W;
    using Y = typename decltype(types)::Y;
    Y* const y = static_cast<Y*>(call.y);
    const bool streaming = streams(y, Units(call.args.rows, call.args.cols));
    NoisyWeight<T, W> weights(call.args);
    for_rows<T>(call.args, begin, end, [&](int64_t, int64_t, int64_t first, int64_t last, const RowGrid<T>& row) {
      const Divisor<T> scale(row.scale);
      weights.for_spans(
          first, last,
          [&](int64_t i, auto count, const Vec<T>& w) QK_INLINE_LAMBDA {
            const Vec<T> code = code_of(w, scale.template divide<false>(w), row);
            put<NormalOrZero>(y + i, value_of(code, row), count, streaming);
          },
          [] {});
    });
    if (streaming) stream_fence();
  });
}

void fake_quantize_backward(const FakeQuantizeBackwardCall& call, double* partial, int64_t begin, int64_t end) {
  const Units units(call.args.rows, call.args.cols);
  with_types(call.args.w_type, call.g_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using W = typename decltype(types)::W;
    using Y = typename decltype(types)::Y;
    const Y* const g = static_cast<const Y*>(call.g);
    W* const dw = static_cast<W*>(call.dw);
    const bool streaming = streams(dw, units), shifted = call.dz != nullptr;
    NoisyWeight<T, W> weights(call.args);
    for_rows<T>(call.args, begin, end,
                [&](int64_t r, int64_t piece, int64_t first, int64_t last, const RowGrid<T>& row) {
                  const Divisor<T> scale(row.scale);
                  double total_s = 0, total_z = 0;
                  Vec<T> sum_s(T(0)), sum_z(T(0));
                  weights.for_spans(
                      first, last,
                      [&](int64_t i, auto count, const Vec<T>& w) QK_INLINE_LAMBDA {
                        const Vec<T> upstream = get(g + i, count);
                        const Slopes<Vec<T>, T> slopes(w, scale.template divide<true>(w), row);
                        put<Exact>(dw + i, slopes.masked(upstream), count, streaming);
                        sum_s = sum_s + upstream * slopes.scale;
                        if (shifted) sum_z = sum_z + upstream * slopes.zero_point;
                      },
                      [&] {
                        total_s += sum(sum_s);
                        total_z += sum(sum_z);
                        sum_s = sum_z = Vec<T>(T(0));
                      });
                  if (units.pieces_per_row == 1) {
                    write_scale(call.ds, call.args.scale_type, r, total_s * call.args.grad_scale);
                    if (shifted) write_scale(call.dz, call.args.scale_type, r, total_z * call.args.grad_scale);
                  } else {
                    double* const out = partial + 2 * (r * units.pieces_per_row + piece);
                    out[0] = total_s;
                    out[1] = total_z;
                  }
                });
    if (streaming) stream_fence();
  });
}

void finish_fake_quantize_backward(const FakeQuantizeBackwardCall& call, const double* partial) {
  const Units units(call.args.rows, call.args.cols);
  if (units.pieces_per_row == 1) return;
  for (int64_t row = 0; row < units.rows; ++row) {
    double total_s = 0, total_z = 0;
    for (int64_t piece = 0; piece < units.pieces_per_row; ++piece) {
      total_s += partial[2 * (row * units.pieces_per_row + piece)];
      total_z += partial[2 * (row * units.pieces_per_row + piece) + 1];
    }
    write_scale(call.ds, call.args.scale_type, row, total_s * call.args.grad_scale);
    if (call.dz) write_scale(call.dz, call.args.scale_type, row, total_z * call.args.grad_scale);
  }
}

void fake_quantize_jvp(const FakeQuantizeJvpCall& call, int64_t begin, int64_t end) {
  with_types(call.args.w_type, call.y_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using W = typename decltype(types)::W;
    using Y = typename decltype(types)::Y;
    const W* const tangent_w = static_cast<const W*>(call.tangent_w);
    Y *const y = static_cast<Y*>(call.y), *const value = static_cast<Y*>(call.value);
    NoisyWeight<T, W> weights(call.args);
    for_rows<T>(call.args, begin, end, [&](int64_t r, int64_t, int64_t first, int64_t last, const RowGrid<T>& row) {
      const auto tangent = [&](const void* p) {
        return p ? static_cast<T>(read_scale(p, call.args.scale_type, r)) * static_cast<T>(call.args.grad_scale) : T(0);
      };
      const Divisor<T> scale(row.scale);
      const Vec<T> along_s(tangent(call.tangent_scale)), along_z(tangent(call.tangent_zero_point));
      weights.for_spans(
          first, last,
          [&](int64_t i, auto count, const Vec<T>& w) QK_INLINE_LAMBDA {
            const Vec<T> ratio = scale.template divide<true>(w);
            const Slopes<Vec<T>, T> slopes(w, ratio, row);
            if (value) put<NormalOrZero>(value + i, value_of(code_of(w, ratio, row), row), count);
            Vec<T> out(T(0));
            if (tangent_w) out = slopes.masked(get(tangent_w + i, count));
            if (call.tangent_scale) out = out + slopes.scale * along_s;
            if (call.tangent_zero_point) out = out + slopes.zero_point * along_z;
            put<Rounded>(y + i, out, count);
          },
          [] {});
    });
  });
}

}  // namespace QK_ISA
}  // namespace qk
