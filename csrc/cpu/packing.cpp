// Packing codes, unpacking them, and dequantizing packed weights.
#include "packing.h"

#include <algorithm>

#include "packed_codes.h"

namespace qk {
namespace QK_ISA {

void pack(const PackCall& call, int64_t begin, int64_t end) {
  const int64_t bytes = row_bytes(call.cols, call.bits);
  const uint8_t* const codes = static_cast<const uint8_t*>(call.codes);
  const auto low = static_cast<uint8_t>(call.code_min);
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* const from = codes + r * call.cols;
    uint8_t* const to = call.packed + r * bytes;
    for (int64_t i = 0; i < call.cols; i += 8) {
      uint8_t eight[8] = {};
      const int64_t n = std::min<int64_t>(8, call.cols - i);
      // Codes are int8 or uint8; modulo 256 the difference is the same.
      for (int64_t j = 0; j < n; ++j) eight[j] = static_cast<uint8_t>(from[i + j] - low);
      uint64_t v;
      std::memcpy(&v, eight, 8);
      v = gather(v, call.bits);
      std::memcpy(to + i / 8 * call.bits, &v, static_cast<size_t>(row_bytes(n, call.bits)));
    }
  }
}

void unpack(const UnpackCall& call, int64_t begin, int64_t end) {
  const int64_t bytes = row_bytes(call.cols, call.bits);
  uint8_t* const codes = static_cast<uint8_t*>(call.codes);
  const auto low = static_cast<uint8_t>(call.code_min);
  with_bits(call.bits, [&](auto bits) {
    uint8_t span[512 + 64];
    for (int64_t r = begin; r < end; ++r)
      for (int64_t i = 0; i < call.cols; i += 512) {
        const int64_t n = std::min<int64_t>(512, call.cols - i);
        unpack_codes<bits>(call.packed + r * bytes, i, n, span);
        uint8_t* const to = codes + r * call.cols + i;
        for (int64_t j = 0; j < n; ++j) to[j] = static_cast<uint8_t>(span[j] + low);
      }
  });
}

// Units: rows of all experts.
void dequantize_packed(const LowbitLinearCall& call, void* out, DType type, int64_t begin, int64_t end) {
  float lanes[kDequantizeSpan + kLanes];
  const auto put = [&](auto* to) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t i = 0; i < call.cols; i += kDequantizeSpan) {
        const int64_t n = std::min(kDequantizeSpan, call.cols - i);
        dequantize_span(call, r, i, n, lanes);
        auto* const row = to + r * call.cols + i;
        int64_t j = 0;
        for (; j + kLanes <= n; j += kLanes) store_normal(row + j, load(lanes + j));
        for (; j < n; ++j) {
          std::remove_reference_t<decltype(*to)> last[kLanes];
          store_normal(last, load_first(lanes + j, 1));
          row[j] = last[0];
        }
      }
  };
  switch (type) {
    case DType::bf16:
      return put(static_cast<bfloat16*>(out));
    case DType::f16:
      return put(static_cast<float16*>(out));
    default:
      return put(static_cast<float*>(out));
  }
}

}  // namespace QK_ISA
}  // namespace qk
