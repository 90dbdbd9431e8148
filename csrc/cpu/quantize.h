// Weights to integer codes and back on the CPU. begin and end count Units of a weight.
#pragma once

#include "../common/quantize.h"
#include "isa_kernel.h"

namespace qk {

QK_ISA_KERNEL(quantize, void(const QuantizeCall&, int64_t begin, int64_t end));
QK_ISA_KERNEL(dequantize, void(const DequantizeCall&, int64_t begin, int64_t end));

}  // namespace qk
