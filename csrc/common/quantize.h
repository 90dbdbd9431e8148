// The calls that turn weights into integer codes, and codes into weights.
#pragma once

#include "quant_args.h"

namespace qk {

struct QuantizeCall {
  QuantArgs args;
  void* codes;  // uint8 if code_max > 127, else int8
  int32_t code_min, code_max;
};

struct DequantizeCall {
  QuantArgs args;  // w is unused
  const void* codes;
  bool codes_unsigned;
  void* y;
  DType y_type;
};

}  // namespace qk
