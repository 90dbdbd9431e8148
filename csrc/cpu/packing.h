// Packing codes, unpacking them, and dequantizing packed weights on the CPU. Rows are packed one by one, so that each
// starts at a byte. begin and end count rows, of all experts.
#pragma once

#include "../common/lowbit_linear.h"
#include "isa_kernel.h"

namespace qk {

struct PackCall {
  const void* codes;  // [rows, cols], int8 or uint8
  uint8_t* packed;    // [rows, row_bytes]
  int64_t rows, cols;
  int32_t code_min, bits;
};

struct UnpackCall {
  const uint8_t* packed;
  void* codes;
  int64_t rows, cols;
  int32_t code_min, bits;
};

QK_ISA_KERNEL(pack, void(const PackCall&, int64_t begin, int64_t end));
QK_ISA_KERNEL(unpack, void(const UnpackCall&, int64_t begin, int64_t end));
QK_ISA_KERNEL(dequantize_packed, void(const LowbitLinearCall&, void* out, DType, int64_t begin, int64_t end));

}  // namespace qk
