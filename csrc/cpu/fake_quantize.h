// Fake quantization of weights on the CPU. begin and end count Units of a weight.
#pragma once

#include "../common/fake_quantize.h"
#include "isa_kernel.h"

namespace qk {

QK_ISA_KERNEL(fake_quantize, void(const FakeQuantizeCall&, int64_t begin, int64_t end));

// `partial` is 2 * rows * pieces_per_row doubles, for sums of rows that are cut into pieces; finish adds these in
// order.
QK_ISA_KERNEL(fake_quantize_backward,
              void(const FakeQuantizeBackwardCall&, double* partial, int64_t begin, int64_t end));
QK_ISA_KERNEL(finish_fake_quantize_backward, void(const FakeQuantizeBackwardCall&, const double* partial));

QK_ISA_KERNEL(fake_quantize_jvp, void(const FakeQuantizeJvpCall&, int64_t begin, int64_t end));

}  // namespace qk
