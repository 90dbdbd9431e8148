// The perturbation of sharpness-aware minimization on the CPU. begin and end count pieces of kUnitElements elements.
#pragma once

#include "../common/dtype.h"
#include "isa_kernel.h"

namespace qk {

struct PerturbCall {
  void *w, *g;
  const float* factor;
  int64_t numel;
  DType w_type, g_type;
  double eta;
  bool adaptive, swap;
};

struct PerturbationNormsCall {
  const void *g, *w;  // w is null unless the perturbation is adaptive
  int64_t numel;
  DType w_type, g_type;
  double eta;
};

QK_ISA_KERNEL(perturb, void(const PerturbCall&, int64_t begin, int64_t end));
// Leaves two partial sums for each piece.
QK_ISA_KERNEL(perturbation_norms, void(const PerturbationNormsCall&, double* partial, int64_t begin, int64_t end));

}  // namespace qk
