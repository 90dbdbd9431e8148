// Softmax cross-entropy on the CPU. begin and end count rows.
#pragma once

#include "../common/dtype.h"
#include "isa_kernel.h"

namespace qk {

// Softmax cross-entropy of logits [rows, cols]. Tensors of one value per row are float64 for float64 logits, else
// float32. Outputs may be null, and may be the logits or the tangent.
struct CrossEntropyCall {
  const void *logits, *tangent;
  const int64_t* targets;
  const void *lse, *g, *tangent_g;  // tangent_g may be null
  void *loss, *lse_out;             // forward
  void *grad, *tangent_grad, *tangent_loss;
  int64_t rows, cols, ignore_index;
  DType type;
};

QK_ISA_KERNEL(cross_entropy, void(const CrossEntropyCall&, int64_t begin, int64_t end));
QK_ISA_KERNEL(cross_entropy_backward, void(const CrossEntropyCall&, int64_t begin, int64_t end));
QK_ISA_KERNEL(cross_entropy_hvp, void(const CrossEntropyCall&, int64_t begin, int64_t end));

}  // namespace qk
