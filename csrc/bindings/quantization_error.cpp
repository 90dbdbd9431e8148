// The error of quantizing a weight, by which scales are chosen.
#include "../cpu/quantization_error.h"

#include <vector>

#include "quant_args.h"
#include "registry.h"
#include "tensors.h"

namespace qk {
namespace {

void quantization_error(const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point,
                        const OptionalTensor& moments, Constants grid, const Tensor& out) {
  if (w.numel() == 0) {
    out.zero_();
    return;
  }
  const int64_t features = w.size(-1), experts = moments ? moments->numel() / features : 1;
  const QuantizationErrorCall call{quant_args(w, scale, zero_point, std::nullopt, grid),
                                   moments ? moments->const_data_ptr<double>() : nullptr, features, w.numel() / experts,
                                   out.mutable_data_ptr<double>()};
  const Units units(call.args.rows, call.args.cols);
  std::vector<double> partial(units.pieces_per_row > 1 ? units.rows * units.pieces_per_row : 0);
  at::parallel_for(0, units.count(), 1,
                   [&](int64_t begin, int64_t end) { cpu::quantization_error(call, partial.data(), begin, end); });
  cpu::finish_quantization_error(call, partial.data());
}

QK_CPU_KERNEL(quantization_error);

}  // namespace
}  // namespace qk
