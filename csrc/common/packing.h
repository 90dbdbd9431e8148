// The packed form of codes (qatkernels/ops/packing.py has its definition): eight codes of b bits are b bytes.
#pragma once

#include <cstdint>

#include "grid.h"

namespace qk {

QK_HOST_DEVICE constexpr int64_t row_bytes(int64_t cols, int bits) { return (cols * bits + 7) / 8; }

// Unpacks eight codes of `bits` bits each, the low bits of v, to eight bytes. Higher bits are ignored.
QK_HOST_DEVICE constexpr uint64_t spread(uint64_t v, int bits) {
  const uint64_t four = (uint64_t{1} << (4 * bits)) - 1, two = (uint64_t{1} << (2 * bits)) - 1,
                 one = (uint64_t{1} << bits) - 1;
  v = (v & four) | (v >> (4 * bits) & four) << 32;
  v = (v & two * 0x0000000100000001) | (v >> (2 * bits) & two * 0x0000000100000001) << 16;
  return (v & one * 0x0001000100010001) | (v >> bits & one * 0x0001000100010001) << 8;
}

// The inverse of spread. The bytes must not have bits beyond the codes.
QK_HOST_DEVICE constexpr uint64_t gather(uint64_t v, int bits) {
  v = (v & 0x00FF00FF00FF00FF) | (v >> 8 & 0x00FF00FF00FF00FF) << bits;
  v = (v & 0x0000FFFF0000FFFF) | (v >> 16 & 0x0000FFFF0000FFFF) << (2 * bits);
  return (v & 0x00000000FFFFFFFF) | (v >> 32) << (4 * bits);
}

}  // namespace qk
