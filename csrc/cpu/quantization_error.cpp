// The error of quantizing a weight: one read of the weight, and float64 sums whose order depends on the shape alone.
#include "quantization_error.h"

#include <algorithm>

#include "divide.h"
#include "rows.h"

namespace qk {
namespace QK_ISA {

namespace {

// The first `count` lanes as float64, the others 0: what a lane beyond the end holds is no error.
template <class T, class Count>
QK_INLINE Vec<double> widened(const Vec<T>& x, Count count) {
  T lanes[kLanes];
  store(lanes, x);
  for (int64_t i = count; i < kLanes; ++i) lanes[i] = T(0);
  Vec<double> wide;
  for (int i = 0; i < Vec<double>::kCount; ++i)
    wide.part[i] = load_wide(static_cast<const T*>(lanes) + i * Vec<double>::kWidth);
  return wide;
}

}  // namespace

void quantization_error(const QuantizationErrorCall& call, double* partial, int64_t begin, int64_t end) {
  const Units units(call.args.rows, call.args.cols);
  with_types(call.args.w_type, call.args.w_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using W = typename decltype(types)::W;
    const W* const w = static_cast<const W*>(call.args.w);
    for_rows<T>(
        call.args, begin, end, [&](int64_t r, int64_t piece, int64_t first, int64_t last, const RowGrid<T>& row) {
          const Divisor<T> scale(row.scale);
          Vec<double> total(0.0);
          const auto squared = [&](int64_t i, auto count) QK_INLINE_LAMBDA {
            const Vec<T> lanes = get(w + i, count);
            const Vec<T> code = code_of(lanes, scale.template divide<false>(lanes), row);
            const Vec<double> difference = widened(lanes - value_of(code, row), count);
            return difference * difference;
          };
          if (call.moments == nullptr) {
            for_lanes(last - first,
                      [&](int64_t i, auto count) QK_INLINE_LAMBDA { total = total + squared(first + i, count); });
          } else {
            // A row that shares a scale may have several rows of the weight: moments begin anew with each of these.
            for (int64_t start = first; start < last;) {
              const int64_t feature = start % call.features, n = std::min(call.features - feature, last - start);
              const double* const moments = call.moments + start / call.numel * call.features + feature;
              for_lanes(n, [&](int64_t i, auto count) QK_INLINE_LAMBDA {
                total = total + squared(start + i, count) * get(moments + i, count);
              });
              start += n;
            }
          }
          (units.pieces_per_row == 1 ? call.error[r] : partial[r * units.pieces_per_row + piece]) = sum(total);
        });
  });
}

void finish_quantization_error(const QuantizationErrorCall& call, const double* partial) {
  const Units units(call.args.rows, call.args.cols);
  if (units.pieces_per_row == 1) return;
  for (int64_t row = 0; row < units.rows; ++row) {
    double total = 0;
    for (int64_t piece = 0; piece < units.pieces_per_row; ++piece) total += partial[row * units.pieces_per_row + piece];
    call.error[row] = total;
  }
}

}  // namespace QK_ISA
}  // namespace qk
