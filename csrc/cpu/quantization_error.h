// The error of quantizing a weight, for each of its scales, on the CPU. begin and end count Units of the weight.
#pragma once

#include "../common/quant_args.h"
#include "isa_kernel.h"

namespace qk {

struct QuantizationErrorCall {
  QuantArgs args;
  const double* moments;  // [experts, features], null without: the weight on each squared error
  int64_t features;       // of a row of the weight; a row of `args`, which shares a scale, may be longer or shorter
  int64_t numel;          // of the weight that one row of moments is for
  double* error;          // [args.rows]
};

// `partial` is rows * pieces_per_row doubles, for sums of rows that are cut into pieces; finish adds these in order.
QK_ISA_KERNEL(quantization_error, void(const QuantizationErrorCall&, double* partial, int64_t begin, int64_t end));
QK_ISA_KERNEL(finish_quantization_error, void(const QuantizationErrorCall&, const double* partial));

}  // namespace qk
