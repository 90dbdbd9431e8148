// The perturbation of sharpness-aware minimization, which changes weights in place, and the norms that it is scaled by.
#include "../cpu/perturb.h"

#include <vector>

#include "quant_args.h"
#include "registry.h"
#include "tensors.h"

namespace qk {
namespace {

// How many pieces of kUnitElements elements, which kernels count.
int64_t units_of(int64_t numel) { return (numel + kUnitElements - 1) / kUnitElements; }

// With `swap` the gradient receives the old weight, so `g` is written too.
void perturb(const Tensor& w, void* g, DType g_type, const Tensor& factor, std::optional<double> eta, bool swap) {
  const PerturbCall call{
      w.mutable_data_ptr(), g,   factor.const_data_ptr<float>(), w.numel(), dtype_of(w), g_type, eta.value_or(0),
      eta.has_value(),      swap};
  at::parallel_for(0, units_of(w.numel()), 1, [&](int64_t begin, int64_t end) { cpu::perturb(call, begin, end); });
}
void perturb_(const Tensor& w, const Tensor& g, const Tensor& factor, std::optional<double> eta) {
  perturb(w, const_cast<void*>(g.const_data_ptr()), dtype_of(g), factor, eta, false);
}
void perturb_swap_(const Tensor& w, const Tensor& g, const Tensor& factor, std::optional<double> eta) {
  perturb(w, g.mutable_data_ptr(), dtype_of(g), factor, eta, true);
}

void perturbation_norms(const Tensor& g, const OptionalTensor& w, double eta, const Tensor& out) {
  const int64_t units = units_of(g.numel());
  std::vector<double> partial(2 * units);
  const PerturbationNormsCall call{g.const_data_ptr(),   pointer_or_null(w), g.numel(),
                                   dtype_of(w ? *w : g), dtype_of(g),        eta};
  at::parallel_for(0, units, 1,
                   [&](int64_t begin, int64_t end) { cpu::perturbation_norms(call, partial.data(), begin, end); });
  double once = 0, twice = 0;
  for (int64_t unit = 0; unit < units; ++unit) {
    once += partial[2 * unit];
    twice += partial[2 * unit + 1];
  }
  out.mutable_data_ptr<double>()[0] = once;
  out.mutable_data_ptr<double>()[1] = twice;
}

QK_CPU_KERNEL(perturb_);
QK_CPU_KERNEL(perturb_swap_);
QK_CPU_KERNEL(perturbation_norms);

}  // namespace
}  // namespace qk
