// The call of a product with packed weights.
#pragma once

#include "dtype.h"

namespace qk {

// y = x W^T + bias. With offsets, tokens [offsets[e - 1], offsets[e]) belong to expert e.
struct LowbitLinearCall {
  const void* x;            // [tokens, cols]
  const uint8_t* packed;    // [experts, rows, row_bytes]
  const void* scale;        // [experts, rows, groups]
  const float* zero_point;  // like scale, or null
  const void* bias;         // [rows], or null
  const int32_t* offsets;   // [experts], or null for one expert
  void* y;                  // [tokens, rows]
  int64_t tokens, rows, cols, groups, experts;
  DType x_type, scale_type, bias_type;
  double steps, offset;              // value = (code + offset - zero) * (scale / steps)
  int32_t code_min, bits, act_bits;  // act_bits is 0 if x is not quantized
};

}  // namespace qk
