// Fake quantization, codes, dynamic activations, noise.
#include "../cpu/fake_quantize.h"

#include <vector>

#include "../cpu/dynamic.h"
#include "../cpu/noise.h"
#include "../cpu/quantize.h"
#include "gpu.h"
#include "quant_args.h"
#include "registry.h"
#include "tensors.h"
#if defined(QK_WITH_CUDA)
#include "../cuda/dynamic.h"
#include "../cuda/fake_quantize.h"
#include "../cuda/noise.h"
#include "../cuda/quantize.h"
#endif

namespace qk {
namespace {

// run_on_gpu runs a call on the GPU that its tensors are on, and returns whether they are on one.
#if defined(QK_WITH_CUDA)
template <class Call>
bool run_on_gpu(const Call& call, at::Device device, cudaError_t (*launcher)(const Call&, cudaStream_t)) {
  if (device.is_cuda()) launch_on(device, [&](cudaStream_t stream) { return launcher(call, stream); });
  return device.is_cuda();
}
bool run_on_gpu(const FakeQuantizeCall& call, at::Device device) {
  return run_on_gpu(call, device, cuda::fake_quantize);
}
bool run_on_gpu(const FakeQuantizeJvpCall& call, at::Device device) {
  return run_on_gpu(call, device, cuda::fake_quantize_jvp);
}
bool run_on_gpu(const QuantizeCall& call, at::Device device) { return run_on_gpu(call, device, cuda::quantize); }
bool run_on_gpu(const DequantizeCall& call, at::Device device) { return run_on_gpu(call, device, cuda::dequantize); }
bool run_on_gpu(const FakeQuantizeDynamicCall& call, at::Device device) {
  return run_on_gpu(call, device, cuda::fake_quantize_dynamic);
}
bool run_on_gpu(const NormalCall& call, at::Device device) { return run_on_gpu(call, device, cuda::normal); }
bool run_on_gpu(const FakeQuantizeBackwardCall& call, at::Device device) {
  if (!device.is_cuda()) return false;
  const at::Tensor memory = workspace(cuda::fake_quantize_backward_workspace(call), device);
  launch_on(device,
            [&](cudaStream_t stream) { return cuda::fake_quantize_backward(call, memory.mutable_data_ptr(), stream); });
  return true;
}
#else
template <class Call>
bool run_on_gpu(const Call&, at::Device) {
  return false;
}
#endif

}  // namespace

void fake_quantize_dynamic(const Tensor& x, int64_t bits, const Tensor& out) {
  const int64_t cols = x.size(-1), rows = cols ? x.numel() / cols : 0;
  const FakeQuantizeDynamicCall call{x.const_data_ptr(), out.mutable_data_ptr(),    rows, cols,
                                     dtype_of(x),        static_cast<int32_t>(bits)};
  if (run_on_gpu(call, x.device())) return;
  at::parallel_for(0, rows, grain_of_rows(cols),
                   [&](int64_t begin, int64_t end) { cpu::fake_quantize_dynamic(call, begin, end); });
}

namespace {

// Calls f(begin, end) for the units of a weight.
template <class F>
void for_units(const QuantArgs& args, F f) {
  at::parallel_for(0, Units(args.rows, args.cols).count(), 1, f);
}

void fake_quantize(const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point, const OptionalTensor& seed,
                   Constants grid, double noise_std, double scale_noise_std, double grad_scale, OptionalType dtype,
                   const Tensor& out) {
  const FakeQuantizeCall call{quant_args(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale),
                              out.mutable_data_ptr(), dtype_of(out)};
  if (run_on_gpu(call, w.device())) return;
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
  if (run_on_gpu(call, w.device())) return;
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
  if (run_on_gpu(call, w.device())) return;
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

void quantize(const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point, Constants grid, int64_t code_min,
              int64_t code_max, const Tensor& out) {
  const QuantizeCall call{quant_args(w, scale, zero_point, std::nullopt, grid), out.mutable_data_ptr(),
                          static_cast<int32_t>(code_min), static_cast<int32_t>(code_max)};
  if (run_on_gpu(call, w.device())) return;
  for_units(call.args, [&](int64_t begin, int64_t end) { cpu::quantize(call, begin, end); });
}

void dequantize(const Tensor& codes, const Tensor& scale, const OptionalTensor& zero_point, Constants grid,
                at::ScalarType dtype, const Tensor& out) {
  const QuantArgs args = quant_args(codes, scale, zero_point, std::nullopt, grid);
  const DequantizeCall call{args, args.w, codes.scalar_type() == at::kByte, out.mutable_data_ptr(), dtype_of(out)};
  if (run_on_gpu(call, codes.device())) return;
  for_units(call.args, [&](int64_t begin, int64_t end) { cpu::dequantize(call, begin, end); });
}

void normal(const Tensor& seed, int64_t numel, int64_t stream, const Tensor& out) {
  const NormalCall call{seed.const_data_ptr<int64_t>(), out.mutable_data_ptr<float>(), numel,
                        static_cast<uint32_t>(stream)};
  if (run_on_gpu(call, seed.device())) return;
  at::parallel_for(0, (numel + kNoiseSpan - 1) / kNoiseSpan, 1,
                   [&](int64_t begin, int64_t end) { cpu::normal(call, begin, end); });
}

QK_KERNEL(fake_quantize);
QK_KERNEL(fake_quantize_backward);
QK_KERNEL(fake_quantize_jvp);
QK_CPU_KERNEL(fake_quantize_dual);
QK_KERNEL(quantize);
QK_KERNEL(dequantize);
QK_KERNEL(fake_quantize_dynamic);
QK_KERNEL(normal);

}  // namespace
}  // namespace qk
