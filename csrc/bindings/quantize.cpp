// Weights to integer codes and back.
#include "../cpu/quantize.h"

#include "gpu.h"
#include "quant_args.h"
#include "registry.h"
#include "tensors.h"
#if defined(QK_WITH_CUDA)
#include "../cuda/quantize.h"
#endif

namespace qk {
namespace {

void quantize(const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point, Constants grid, int64_t code_min,
              int64_t code_max, const Tensor& out) {
  const QuantizeCall call{quant_args(w, scale, zero_point, std::nullopt, grid), out.mutable_data_ptr(),
                          static_cast<int32_t>(code_min), static_cast<int32_t>(code_max)};
  if (QK_RUN_ON_GPU(call, w.device(), cuda::quantize)) return;
  for_units(call.args, [&](int64_t begin, int64_t end) { cpu::quantize(call, begin, end); });
}

void dequantize(const Tensor& codes, const Tensor& scale, const OptionalTensor& zero_point, Constants grid,
                at::ScalarType dtype, const Tensor& out) {
  const QuantArgs args = quant_args(codes, scale, zero_point, std::nullopt, grid);
  const DequantizeCall call{args, args.w, codes.scalar_type() == at::kByte, out.mutable_data_ptr(), dtype_of(out)};
  if (QK_RUN_ON_GPU(call, codes.device(), cuda::dequantize)) return;
  for_units(call.args, [&](int64_t begin, int64_t end) { cpu::dequantize(call, begin, end); });
}

QK_KERNEL(quantize);
QK_KERNEL(dequantize);

}  // namespace
}  // namespace qk
