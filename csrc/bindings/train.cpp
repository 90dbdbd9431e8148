// What training does to weights in place: WinQ's reset, the perturbation of sharpness-aware minimization.
#include <cmath>
#include <vector>

#include "../cpu/kernels.h"
#include "quant_args.h"
#include "tensors.h"

namespace qk {
namespace {

void check_in_place(const char* name, const Tensor& t) {
  TORCH_CHECK(t.device().is_cpu() && t.is_contiguous(), name, " is on ", t.device(), " with strides ", t.strides(),
              ", must be contiguous on a CPU");
}

int64_t units_of(int64_t numel) { return (numel + kUnitElements - 1) / kUnitElements; }

void reset_(Tensor w, const Tensor& scale, const OptionalTensor& zero_point, Constants grid, double quantized_weight) {
  check_in_place("w", w);
  TORCH_CHECK(0 <= quantized_weight && quantized_weight <= 1, "quantized_weight is ", quantized_weight,
              ", must be in [0, 1]");
  const Held held(w, scale, zero_point, std::nullopt, grid);
  if (w.numel() == 0) return;
  const ResetCall call{held.args, w.mutable_data_ptr(), quantized_weight};
  parallel(Units(held.args.rows, held.args.cols).count(),
           [&](int64_t begin, int64_t end) { kernels().reset(call, begin, end); });
}

void check_pair(const Tensor& w, const Tensor& g, bool mixed) {
  check_in_place("w", w);
  check_in_place("g", g);
  dtype_of("w", w);
  dtype_of("g", g);
  TORCH_CHECK(w.sizes() == g.sizes(), "w is of shape ", w.sizes(), ", must be like g, ", g.sizes());
  TORCH_CHECK(w.scalar_type() == g.scalar_type() || (mixed && g.scalar_type() == at::kFloat && w.element_size() == 2),
              "w is ", name_of(w.scalar_type()), ", must be g's ", name_of(g.scalar_type()),
              mixed ? ", or a 16-bit float for a float32 g" : "");
}

void perturb(const Tensor& w, const Tensor& g, const Tensor& factor, std::optional<double> eta, bool swap) {
  check_pair(w, g, !swap);
  TORCH_CHECK(factor.scalar_type() == at::kFloat && factor.numel() == 1 && factor.device().is_cpu(), "factor is ",
              name_of(factor.scalar_type()), " of shape ", factor.sizes(), ", must be one float32 on a CPU");
  TORCH_CHECK(!eta || (*eta >= 0 && std::isfinite(*eta)), "eta is ", eta.value_or(0), ", must be finite and >= 0");
  const PerturbCall call{w.mutable_data_ptr(),
                         const_cast<void*>(g.const_data_ptr()),  // written if swapped, and then mutable
                         factor.const_data_ptr<float>(),
                         w.numel(),
                         dtype_of("w", w),
                         dtype_of("g", g),
                         eta.value_or(0),
                         eta.has_value(),
                         swap};
  parallel(units_of(w.numel()), [&](int64_t begin, int64_t end) { kernels().perturb(call, begin, end); });
}
void perturb_(Tensor w, const Tensor& g, const Tensor& factor, std::optional<double> eta) {
  perturb(w, g, factor, eta, false);
}
void perturb_swap_(Tensor w, Tensor g, const Tensor& factor, std::optional<double> eta) {
  g.mutable_data_ptr();
  perturb(w, g, factor, eta, true);
}

void perturbation_norms_out(const Tensor& g, const OptionalTensor& w, double eta, Tensor out) {
  check_pair(w.value_or(g), g, true);
  TORCH_CHECK(out.is_contiguous() && out.scalar_type() == at::kDouble && out.numel() == 2 && out.device().is_cpu(),
              "out must be a contiguous float64 tensor with 2 elements on a CPU");
  const int64_t units = units_of(g.numel());
  std::vector<double> partial(2 * units);
  const PerturbationNormsCall call{g.const_data_ptr(), w ? w->const_data_ptr() : nullptr,
                                   g.numel(),          w ? dtype_of("w", *w) : dtype_of("g", g),
                                   dtype_of("g", g),   eta};
  parallel(units, [&](int64_t begin, int64_t end) { kernels().perturbation_norms(call, partial.data(), begin, end); });
  double once = 0, twice = 0;
  for (int64_t unit = 0; unit < units; ++unit) {
    once += partial[2 * unit];
    twice += partial[2 * unit + 1];
  }
  out.mutable_data_ptr<double>()[0] = once;
  out.mutable_data_ptr<double>()[1] = twice;
}
Tensor perturbation_norms(const Tensor& g, const OptionalTensor& w, double eta) {
  Tensor out = allocate({2}, at::kDouble, g.device());
  perturbation_norms_out(g, w, eta, out);
  return out;
}

}  // namespace

void add_train(Ops& ops) {
  QK_CPU_OP(ops, reset_);
  QK_CPU_OP(ops, perturb_);
  QK_CPU_OP(ops, perturb_swap_);
  QK_CPU_OP(ops, perturbation_norms);
  QK_CPU_OP(ops, perturbation_norms_out);
}

}  // namespace qk
