// The reset of WinQ on the CPU: weights move towards their quantized values unless their code would change. One read
// and one write of the weight.
#include "reset.h"

#include "divide.h"
#include "rows.h"

namespace qk {
namespace QK_ISA {

namespace {

// x as it would come back from memory after being stored as W.
template <class W, class T>
QK_INLINE Vec<T> rounded(const Vec<T>& x) {
  if constexpr (std::is_same_v<W, T>) {
    return x;
  } else {
    W lanes[kLanes];
    store(lanes, x);
    return load(static_cast<const W*>(lanes));
  }
}

}  // namespace

void reset(const ResetCall& call, int64_t begin, int64_t end) {
  with_types(call.args.w_type, call.args.w_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using W = typename decltype(types)::W;
    W* const w = static_cast<W*>(call.w);
    const Vec<T> keep(static_cast<T>(1 - call.quantized_weight)), move(static_cast<T>(call.quantized_weight));
    for_rows<T>(call.args, begin, end, [&](int64_t, int64_t, int64_t first, int64_t last, const RowGrid<T>& row) {
      const Divisor<T> scale(row.scale);
      for_lanes(last - first, [&](int64_t i, auto count) QK_INLINE_LAMBDA {
        const Vec<T> old = get(w + first + i, count), code = code_of(old, scale.template divide<false>(old), row);
        const Vec<T> moved = rounded<W>(old * keep + value_of(code, row) * move);
        put<Exact>(w + first + i, select(code_of(moved, scale.template divide<false>(moved), row) == code, moved, old),
                   count);
      });
    });
  });
}

}  // namespace QK_ISA
}  // namespace qk
