// Dynamic quantization of activations on the CPU. begin and end count rows.
#pragma once

#include "../common/dynamic.h"
#include "isa_kernel.h"

namespace qk {

QK_ISA_KERNEL(fake_quantize_dynamic, void(const FakeQuantizeDynamicCall&, int64_t begin, int64_t end));

}  // namespace qk
