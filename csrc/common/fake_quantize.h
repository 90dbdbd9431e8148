// The calls of fake quantization: forward, backward and forward-mode derivative.
#pragma once

#include "quant_args.h"

namespace qk {

struct FakeQuantizeCall {
  QuantArgs args;
  void* y;
  DType y_type;
};

struct FakeQuantizeBackwardCall {
  QuantArgs args;
  const void* g;
  DType g_type;
  void *dw, *ds, *dz;  // dtypes of w and of scale; dz is null without a zero point
};

struct FakeQuantizeJvpCall {
  QuantArgs args;
  const void *tangent_w, *tangent_scale, *tangent_zero_point;  // each may be null
  void* y;
  DType y_type;
  void* value;  // of y's type: what FakeQuantizeCall computes; null if not wanted, and always on CUDA
};

}  // namespace qk
