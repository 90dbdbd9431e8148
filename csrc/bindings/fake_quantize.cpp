// Fake quantization, codes, dynamic activations, noise.
#include <vector>

#include "../cpu/kernels.h"
#include "quant_args.h"
#include "registry.h"
#include "run.h"
#include "tensors.h"

namespace qk {
static int64_t units_of(const QuantArgs& args) {
  return args.rows > 0 && args.cols > 0 ? Units(args.rows, args.cols).count() : 0;
}

static void run_on_cpu(const FakeQuantizeCall& call) {
  parallel(units_of(call.args), [&](int64_t begin, int64_t end) { kernels().forward(call, begin, end); });
}
static void run_on_cpu(const FakeQuantizeBackwardCall& call) {
  const Units units(call.args.rows, call.args.cols);
  std::vector<double> partial(units.pieces_per_row > 1 ? 2 * units.rows * units.pieces_per_row : 0);
  parallel(units_of(call.args),
           [&](int64_t begin, int64_t end) { kernels().backward(call, partial.data(), begin, end); });
  kernels().finish_backward(call, partial.data());
}
static void run_on_cpu(const FakeQuantizeJvpCall& call) {
  parallel(units_of(call.args), [&](int64_t begin, int64_t end) { kernels().jvp(call, begin, end); });
}
static void run_on_cpu(const QuantizeCall& call) {
  parallel(units_of(call.args), [&](int64_t begin, int64_t end) { kernels().quantize(call, begin, end); });
}
static void run_on_cpu(const DequantizeCall& call) {
  parallel(units_of(call.args), [&](int64_t begin, int64_t end) { kernels().dequantize(call, begin, end); });
}
static void run_on_cpu(const FakeQuantizeDynamicCall& call) {
  parallel(
      call.rows, [&](int64_t begin, int64_t end) { kernels().dynamic(call, begin, end); },
      std::max<int64_t>(1, kUnitElements / std::max<int64_t>(call.cols, 1)));
}
static void run_on_cpu(const NormalCall& call) {
  parallel((call.numel + kNoiseSpan - 1) / kNoiseSpan,
           [&](int64_t begin, int64_t end) { kernels().normal(call, begin, end); });
}

void fake_quantize_dynamic(const Tensor& x, int64_t bits, const Tensor& out) {
  const int64_t cols = x.size(-1), rows = cols ? x.numel() / cols : 0;
  const FakeQuantizeDynamicCall call{x.const_data_ptr(), out.mutable_data_ptr(),    rows, cols,
                                     dtype_of(x),        static_cast<int32_t>(bits)};
  run(call, x.device());
}

namespace {

void fake_quantize(const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point, const OptionalTensor& seed,
                   Constants grid, double noise_std, double scale_noise_std, double grad_scale, OptionalType dtype,
                   const Tensor& out) {
  const QuantArgs args = quant_args(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale);
  run(FakeQuantizeCall{args, out.mutable_data_ptr(), dtype_of(out)}, w.device());
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
  run(call, w.device());
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
  run(call, w.device());
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
  run_on_cpu(call);
}

void quantize(const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point, Constants grid, int64_t code_min,
              int64_t code_max, const Tensor& out) {
  const QuantizeCall call{quant_args(w, scale, zero_point, std::nullopt, grid), out.mutable_data_ptr(),
                          static_cast<int32_t>(code_min), static_cast<int32_t>(code_max)};
  run(call, w.device());
}

void dequantize(const Tensor& codes, const Tensor& scale, const OptionalTensor& zero_point, Constants grid,
                at::ScalarType dtype, const Tensor& out) {
  const QuantArgs args = quant_args(codes, scale, zero_point, std::nullopt, grid);
  const DequantizeCall call{args, args.w, codes.scalar_type() == at::kByte, out.mutable_data_ptr(), dtype_of(out)};
  run(call, codes.device());
}

void normal(const Tensor& seed, int64_t numel, int64_t stream, const Tensor& out) {
  const NormalCall call{seed.const_data_ptr<int64_t>(), out.mutable_data_ptr<float>(), numel,
                        static_cast<uint32_t>(stream)};
  run(call, seed.device());
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
