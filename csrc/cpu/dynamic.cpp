// Dynamic quantization of activations on the CPU, row by row.
#include "dynamic.h"

#include <algorithm>
#include <limits>

#include "rows.h"

namespace qk {
namespace QK_ISA {
namespace {

// The largest magnitude of a row. Magnitudes are compared as the integers that their bits are, so NaN is the largest.
template <class T, class X>
T max_magnitude(const X* x, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  T lanes[kLanes] = {};
  Bits largest_bits[kLanes] = {};
  for_lanes(n, [&](int64_t i, auto count) QK_INLINE_LAMBDA {
    store(lanes, Vec<T>(get(x + i, count)));
    for (int j = 0; j < kLanes; ++j) {
      Bits bits;
      std::memcpy(&bits, &lanes[j], sizeof bits);
      bits &= std::numeric_limits<Bits>::max();
      largest_bits[j] = bits > largest_bits[j] ? bits : largest_bits[j];
    }
  });
  const Bits bits = *std::max_element(largest_bits, largest_bits + kLanes);
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

void fake_quantize_dynamic(const FakeQuantizeDynamicCall& call, int64_t begin, int64_t end) {
  with_types(call.type, call.type, [&](auto types) {
    using T = typename decltype(types)::T;
    using X = typename decltype(types)::W;
    const T qmax = T((1 << (call.bits - 1)) - 1), tiny = T(std::numeric_limits<float>::min());
    for (int64_t row = begin; row < end; ++row) {
      const X* const x = static_cast<const X*>(call.x) + row * call.cols;
      X* const y = static_cast<X*>(call.y) + row * call.cols;
      const T step = max_magnitude<T>(x, call.cols) / qmax;
      const Vec<T> scale(step < tiny ? tiny : step), high(qmax), low(-qmax);
      for_lanes(call.cols, [&](int64_t i, auto count) QK_INLINE_LAMBDA {
        const Vec<T> r = get(x + i, count) / scale;
        const Vec<T> code = round_half_even(min_of(high, max_of(low, r)));
        put<Rounded>(y + i, (code + Vec<T>(T(0))) * scale, count);
      });
    }
  });
}

}  // namespace QK_ISA
}  // namespace qk
