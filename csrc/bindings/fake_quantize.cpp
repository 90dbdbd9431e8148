// Fake quantization of weights: forward, backward and forward-mode derivative. They are one file because their calls
// share most of their arguments.
#include "../cpu/fake_quantize.h"

#include <vector>

#include "gpu.h"
#include "quant_args.h"
#include "registry.h"
#include "tensors.h"
#if defined(QK_WITH_CUDA)
#include "../cuda/fake_quantize.h"
#endif

namespace qk {
namespace {

void fake_quantize(const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point, const OptionalTensor& seed,
                   Constants grid, double noise_std, double scale_noise_std, double grad_scale, OptionalType dtype,
                   const Tensor& out) {
  const FakeQuantizeCall call{quant_args(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale),
                              out.mutable_data_ptr(), dtype_of(out)};
  if (QK_RUN_ON_GPU(call, w.device(), cuda::fake_quantize)) return;
  for_units(call.args, [&](int64_t begin, int64_t end) { cpu::fake_quantize(call, begin, end); });
}

void fake_quantize_backward(const Tensor& g, const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point,
                            const OptionalTensor& seed, Constants grid, double noise_std, double scale_noise_std,
                            double grad_scale, const Tensor& dw, const Tensor& ds, const Tensor& dz) {
  if (w.numel() == 0) {
    ds.zero_();
    dz.zero_();
    return;
  }
  const FakeQuantizeBackwardCall call{
      quant_args(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale),
      g.const_data_ptr(),
      dtype_of(g),
      dw.mutable_data_ptr(),
      ds.mutable_data_ptr(),
      zero_point ? dz.mutable_data_ptr() : nullptr};
#if defined(QK_WITH_CUDA)
  if (w.is_cuda()) {
    const at::Tensor memory = workspace(cuda::fake_quantize_backward_workspace(call), w.device());
    launch_on(w.device(), [&](cudaStream_t stream) {
      return cuda::fake_quantize_backward(call, memory.mutable_data_ptr(), stream);
    });
    return;
  }
#endif
  const Units units(call.args.rows, call.args.cols);
  std::vector<double> partial(units.pieces_per_row > 1 ? 2 * units.rows * units.pieces_per_row : 0);
  for_units(call.args,
            [&](int64_t begin, int64_t end) { cpu::fake_quantize_backward(call, partial.data(), begin, end); });
  cpu::finish_fake_quantize_backward(call, partial.data());
}

void fake_quantize_jvp(const OptionalTensor& tangent_w, const OptionalTensor& tangent_scale,
                       const OptionalTensor& tangent_zero_point, const Tensor& w, const Tensor& scale,
                       const OptionalTensor& zero_point, const OptionalTensor& seed, Constants grid, double noise_std,
                       double scale_noise_std, double grad_scale, OptionalType dtype, const Tensor& out) {
  const FakeQuantizeJvpCall call{quant_args(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale),
                                 pointer_or_null(tangent_w),
                                 pointer_or_null(tangent_scale),
                                 pointer_or_null(tangent_zero_point),
                                 out.mutable_data_ptr(),
                                 dtype_of(out),
                                 nullptr};
  if (QK_RUN_ON_GPU(call, w.device(), cuda::fake_quantize_jvp)) return;
  for_units(call.args, [&](int64_t begin, int64_t end) { cpu::fake_quantize_jvp(call, begin, end); });
}

void fake_quantize_dual(const OptionalTensor& tangent_w, const OptionalTensor& tangent_scale,
                        const OptionalTensor& tangent_zero_point, const Tensor& w, const Tensor& scale,
                        const OptionalTensor& zero_point, const OptionalTensor& seed, Constants grid, double noise_std,
                        double scale_noise_std, double grad_scale, OptionalType dtype, const Tensor& out,
                        const Tensor& tangent) {
  const FakeQuantizeJvpCall call{quant_args(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale),
                                 pointer_or_null(tangent_w),
                                 pointer_or_null(tangent_scale),
                                 pointer_or_null(tangent_zero_point),
                                 tangent.mutable_data_ptr(),
                                 dtype_of(out),
                                 out.mutable_data_ptr()};
  for_units(call.args, [&](int64_t begin, int64_t end) { cpu::fake_quantize_jvp(call, begin, end); });
}

QK_KERNEL(fake_quantize);
QK_KERNEL(fake_quantize_backward);
QK_KERNEL(fake_quantize_jvp);
QK_CPU_KERNEL(fake_quantize_dual);

}  // namespace
}  // namespace qk
