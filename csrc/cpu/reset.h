// The reset of WinQ on the CPU. begin and end count Units of a weight.
#pragma once

#include "../common/quant_args.h"
#include "isa_kernel.h"

namespace qk {

struct ResetCall {
  QuantArgs args;
  void* w;  // args.w, writable: updated in place
  double quantized_weight;
};

QK_ISA_KERNEL(reset, void(const ResetCall&, int64_t begin, int64_t end));

}  // namespace qk
