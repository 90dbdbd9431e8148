// Dynamic quantization of activations. Declared here because products with packed weights in float64 call it too.
#pragma once

#include "tensors.h"

namespace qk {

void fake_quantize_dynamic(const Tensor& x, int64_t bits, const Tensor& out);

}  // namespace qk
