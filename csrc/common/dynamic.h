// The call of dynamic quantization of activations.
#pragma once

#include "dtype.h"

namespace qk {

struct FakeQuantizeDynamicCall {
  const void* x;
  void* y;
  int64_t rows, cols;
  DType type;
  int32_t bits;
};

}  // namespace qk
