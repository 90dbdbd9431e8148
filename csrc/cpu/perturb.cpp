// The perturbation of sharpness-aware minimization on the CPU, and the norms that it is scaled by.
#include "perturb.h"

#include <algorithm>

#include "rows.h"

namespace qk {
namespace QK_ISA {

namespace {

template <class T>
QK_INLINE Vec<T> magnitude(const Vec<T>& x) {
  return select(x < Vec<T>(T(0)), Vec<T>(T(0)) - x, x);
}

// Calls f(unit, begin, n) for the elements of each unit of [first, last).
template <class F>
void for_units(int64_t numel, int64_t first, int64_t last, F f) {
  for (int64_t unit = first; unit < last; ++unit)
    f(unit, unit * kUnitElements, std::min(kUnitElements, numel - unit * kUnitElements));
}

}  // namespace

void perturb(const PerturbCall& call, int64_t begin, int64_t end) {
  with_types(call.g_type, call.w_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using G = typename decltype(types)::W;
    using W = typename decltype(types)::Y;
    W* const w = static_cast<W*>(call.w);
    G* const g = static_cast<G*>(call.g);
    const Vec<T> factor(static_cast<T>(*call.factor)), eta(static_cast<T>(call.eta));
    for_units(call.numel, begin, end, [&](int64_t, int64_t start, int64_t n) {
      for_lanes(n, [&](int64_t i, auto count) QK_INLINE_LAMBDA {
        const Vec<T> old = get(w + start + i, count);
        Vec<T> step = Vec<T>(get(g + start + i, count)) * factor;
        if (call.adaptive) {
          const Vec<T> size = magnitude(old) + eta;
          step = step * (size * size);
        }
        if (call.swap) put<Exact>(g + start + i, old, count);
        put<Rounded>(w + start + i, old + step, count);
      });
    });
  });
}

void perturbation_norms(const PerturbationNormsCall& call, double* partial, int64_t begin, int64_t end) {
  with_types(call.g_type, call.w_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using G = typename decltype(types)::W;
    using W = typename decltype(types)::Y;
    const G* const g = static_cast<const G*>(call.g);
    const W* const w = static_cast<const W*>(call.w);
    const Vec<T> eta(static_cast<T>(call.eta));
    for_units(call.numel, begin, end, [&](int64_t unit, int64_t start, int64_t n) {
      double once_total = 0, twice_total = 0;
      for (int64_t span = 0; span < n; span += kNoiseSpan) {
        Vec<T> once_sum(T(0)), twice_sum(T(0));
        for_lanes(std::min(kNoiseSpan, n - span), [&](int64_t i, auto count) QK_INLINE_LAMBDA {
          Vec<T> once = get(g + start + span + i, count);
          if (w) {
            const Vec<T> size = magnitude(Vec<T>(get(w + start + span + i, count))) + eta;
            once = once * size;
            const Vec<T> twice = once * size;
            twice_sum = twice_sum + twice * twice;
          }
          once_sum = once_sum + once * once;
        });
        once_total += sum(once_sum);
        twice_total += w ? sum(twice_sum) : 0;
      }
      partial[2 * unit] = once_total;
      partial[2 * unit + 1] = w ? twice_total : once_total;
    });
  });
}

}  // namespace QK_ISA
}  // namespace qk
