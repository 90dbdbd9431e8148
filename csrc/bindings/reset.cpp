// WinQ's reset, which changes a weight in place.
#include "../cpu/reset.h"

#include "quant_args.h"
#include "registry.h"
#include "tensors.h"

namespace qk {
namespace {

void reset_(const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point, Constants grid,
            double quantized_weight) {
  if (w.numel() == 0) return;
  const ResetCall call{quant_args(w, scale, zero_point, std::nullopt, grid), w.mutable_data_ptr(), quantized_weight};
  for_units(call.args, [&](int64_t begin, int64_t end) { cpu::reset(call, begin, end); });
}

QK_CPU_KERNEL(reset_);

}  // namespace
}  // namespace qk
