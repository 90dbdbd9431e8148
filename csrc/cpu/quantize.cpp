// On the CPU: weights to integer codes and back, dynamic quantization of activations, and noise by itself.
#include <algorithm>
#include <limits>

#include "rows.h"

namespace qk {
namespace QK_ISA {

namespace {

// Stores n codes, int8 or uint8, as bytes.
template <class T>
QK_INLINE void put_codes(uint8_t* p, const Vec<T>& code, int64_t n) {
  T lanes[kLanes];
  store(lanes, code);
  uint8_t bytes[kLanes];
  for (int j = 0; j < kLanes; ++j) bytes[j] = static_cast<uint8_t>(static_cast<int32_t>(lanes[j]));
  std::memcpy(p, bytes, n);
}

}  // namespace

void quantize(const QuantizeCall& call, int64_t begin, int64_t end) {
  with_types(call.args.w_type, call.args.w_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using W = typename decltype(types)::W;
    NoisyWeight<T, W> weights(call.args);
    const Vec<T> low{T(call.code_min)}, high{T(call.code_max)};
    uint8_t* const codes = static_cast<uint8_t*>(call.codes);
    for_rows<T>(call.args, begin, end, [&](int64_t, int64_t, int64_t first, int64_t last, const RowGrid<T>& row) {
      weights.for_spans(
          first, last,
          [&](int64_t i, auto count, const Vec<T>& w) QK_INLINE_LAMBDA {
            Vec<T> code = code_of(w, w / Vec<T>(row.scale), row);
            code = select(code == code, code, Vec<T>(T(0)));
            code = min_of(high, max_of(low, code));
            put_codes(codes + i, code, count);
          },
          [] {});
    });
  });
}

void dequantize(const DequantizeCall& call, int64_t begin, int64_t end) {
  with_types(call.y_type, call.y_type, [&](auto types) {
    using T = typename decltype(types)::T;
    using Y = typename decltype(types)::Y;
    Y* const y = static_cast<Y*>(call.y);
    for_rows<T>(call.args, begin, end, [&](int64_t, int64_t, int64_t first, int64_t last, const RowGrid<T>& row) {
      for_lanes(last - first, [&](int64_t i, auto count) QK_INLINE_LAMBDA {
        T lanes[kLanes] = {};
        if (call.codes_unsigned) {
          const uint8_t* const codes = static_cast<const uint8_t*>(call.codes) + first + i;
          for (int64_t j = 0; j < count; ++j) lanes[j] = codes[j];
        } else {
          const int8_t* const codes = static_cast<const int8_t*>(call.codes) + first + i;
          for (int64_t j = 0; j < count; ++j) lanes[j] = codes[j];
        }
        put<NormalOrZero>(y + first + i, value_of(load(static_cast<const T*>(lanes)), row), count);
      });
    });
  });
}

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

void dynamic(const FakeQuantizeDynamicCall& call, int64_t begin, int64_t end) {
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

void normal(const NormalCall& call, int64_t begin, int64_t end) {
  NoiseSpan noise;
  for (int64_t span = begin; span < end; ++span) {
    const int64_t first = span * kNoiseSpan, n = std::min(kNoiseSpan, call.numel - first);
    std::memcpy(call.out + first, noise.draw(*call.seed, first, n, call.stream), n * sizeof(float));
  }
}

}  // namespace QK_ISA
}  // namespace qk
