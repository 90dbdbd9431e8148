// Weights to integer codes and back on the CPU.
#include "quantize.h"

#include "divide.h"
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
      const Divisor<T> scale(row.scale);
      weights.for_spans(
          first, last,
          [&](int64_t i, auto count, const Vec<T>& w) QK_INLINE_LAMBDA {
            Vec<T> code = code_of(w, scale.template divide<false>(w), row);
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

}  // namespace QK_ISA
}  // namespace qk
