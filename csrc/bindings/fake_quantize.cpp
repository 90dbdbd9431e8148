// Fake quantization, codes, dynamic activations, noise: shapes and dtypes are the business of the fake rules in
// qatkernels/ops; what is checked here is what memory safety needs.
#include <vector>

#include "../cpu/kernels.h"
#include "quant_args.h"
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

void fake_quantize_dynamic_out(const Tensor& x_, int64_t bits, Tensor out) {
  TORCH_CHECK(x_.dim() > 0, "x has no dimension, must have at least one");
  TORCH_CHECK(2 <= bits && bits <= 8, "bits is ", bits, ", must be 2 to 8");
  check_output("out", out, x_, x_.scalar_type());
  const Tensor x = x_.contiguous();
  const int64_t cols = x.size(-1), rows = cols ? x.numel() / cols : 0;
  const FakeQuantizeDynamicCall call{x.const_data_ptr(), out.mutable_data_ptr(),    rows, cols,
                                     dtype_of("x", x),   static_cast<int32_t>(bits)};
  run(call, x.device());
}

namespace {

void check_y_type(const Tensor& w, at::ScalarType y) {
  dtype_of("w", w);
  TORCH_CHECK(y == w.scalar_type() || (w.scalar_type() == at::kFloat && (y == at::kBFloat16 || y == at::kHalf)),
              "dtype is ", name_of(y), ", must be w's ", name_of(w.scalar_type()),
              ", or a 16-bit float for a float32 w");
}

void fake_quantize_out(const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point,
                       const OptionalTensor& seed, Constants grid, double noise_std, double scale_noise_std,
                       double grad_scale, OptionalType dtype, Tensor out) {
  check_y_type(w, dtype.value_or(w.scalar_type()));
  check_output("out", out, w, dtype.value_or(w.scalar_type()));
  const Held held(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale);
  const FakeQuantizeCall call{held.args, out.mutable_data_ptr(), dtype_of("out", out)};
  run(call, held.device());
}
Tensor fake_quantize(const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point, const OptionalTensor& seed,
                     Constants grid, double noise_std, double scale_noise_std, double grad_scale, OptionalType dtype) {
  check_y_type(w, dtype.value_or(w.scalar_type()));
  Tensor out = like(w, dtype);
  fake_quantize_out(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale, dtype, out);
  return out;
}

void fake_quantize_backward_out(const Tensor& g_, const Tensor& w, const Tensor& scale,
                                const OptionalTensor& zero_point, const OptionalTensor& seed, Constants grid,
                                double noise_std, double scale_noise_std, double grad_scale, Tensor dw, Tensor ds,
                                Tensor dz) {
  TORCH_CHECK(g_.sizes() == w.sizes(), "g has shape ", g_.sizes(), ", must be ", w.sizes(), " like w");
  check_device("g", g_, w.device());
  check_y_type(w, g_.scalar_type());
  check_output("dw", dw, w, w.scalar_type());
  check_output("ds", ds, scale, scale.scalar_type());
  if (zero_point) check_output("dz", dz, scale, scale.scalar_type());
  const Held held(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale);
  const Tensor g = g_.contiguous();
  const FakeQuantizeBackwardCall call{held.args,
                                      g.const_data_ptr(),
                                      dtype_of("g", g),
                                      dw.mutable_data_ptr(),
                                      ds.mutable_data_ptr(),
                                      zero_point ? dz.mutable_data_ptr() : nullptr};
  if (w.numel() == 0) {
    ds.zero_();
    if (zero_point) dz.zero_();
    return;
  }
  run(call, held.device());
}
std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward(const Tensor& g, const Tensor& w, const Tensor& scale,
                                                          const OptionalTensor& zero_point, const OptionalTensor& seed,
                                                          Constants grid, double noise_std, double scale_noise_std,
                                                          double grad_scale) {
  Tensor dw = like(w), ds = like(scale),
         dz = zero_point ? like(scale) : allocate({0}, scale.scalar_type(), scale.device());
  fake_quantize_backward_out(g, w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale, dw, ds, dz);
  return {dw, ds, dz};
}

void fake_quantize_jvp_out(const OptionalTensor& tangent_w, const OptionalTensor& tangent_scale,
                           const OptionalTensor& tangent_zero_point, const Tensor& w, const Tensor& scale,
                           const OptionalTensor& zero_point, const OptionalTensor& seed, Constants grid,
                           double noise_std, double scale_noise_std, double grad_scale, OptionalType dtype,
                           Tensor out) {
  check_y_type(w, dtype.value_or(w.scalar_type()));
  check_output("out", out, w, dtype.value_or(w.scalar_type()));
  const Held held(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale);
  const Tangents along(tangent_w, tangent_scale, tangent_zero_point, held);
  run(along.call(out.mutable_data_ptr(), dtype_of("out", out)), held.device());
}
Tensor fake_quantize_jvp(const OptionalTensor& tangent_w, const OptionalTensor& tangent_scale,
                         const OptionalTensor& tangent_zero_point, const Tensor& w, const Tensor& scale,
                         const OptionalTensor& zero_point, const OptionalTensor& seed, Constants grid, double noise_std,
                         double scale_noise_std, double grad_scale, OptionalType dtype) {
  check_y_type(w, dtype.value_or(w.scalar_type()));
  Tensor out = like(w, dtype);
  fake_quantize_jvp_out(tangent_w, tangent_scale, tangent_zero_point, w, scale, zero_point, seed, grid, noise_std,
                        scale_noise_std, grad_scale, dtype, out);
  return out;
}

void fake_quantize_dual_out(const OptionalTensor& tangent_w, const OptionalTensor& tangent_scale,
                            const OptionalTensor& tangent_zero_point, const Tensor& w, const Tensor& scale,
                            const OptionalTensor& zero_point, const OptionalTensor& seed, Constants grid,
                            double noise_std, double scale_noise_std, double grad_scale, OptionalType dtype, Tensor out,
                            Tensor tangent) {
  check_y_type(w, dtype.value_or(w.scalar_type()));
  for (const Tensor& t : {out, tangent}) check_output("out", t, w, dtype.value_or(w.scalar_type()));
  const Held held(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale);
  const Tangents along(tangent_w, tangent_scale, tangent_zero_point, held);
  run_here(along.call(tangent.mutable_data_ptr(), dtype_of("out", out), out.mutable_data_ptr()), held.device());
}
std::tuple<Tensor, Tensor> fake_quantize_dual(const OptionalTensor& tangent_w, const OptionalTensor& tangent_scale,
                                              const OptionalTensor& tangent_zero_point, const Tensor& w,
                                              const Tensor& scale, const OptionalTensor& zero_point,
                                              const OptionalTensor& seed, Constants grid, double noise_std,
                                              double scale_noise_std, double grad_scale, OptionalType dtype) {
  Tensor out = like(w, dtype), tangent = like(w, dtype);
  fake_quantize_dual_out(tangent_w, tangent_scale, tangent_zero_point, w, scale, zero_point, seed, grid, noise_std,
                         scale_noise_std, grad_scale, dtype, out, tangent);
  return {out, tangent};
}

at::ScalarType code_type(int64_t code_min, int64_t code_max) {
  TORCH_CHECK((-128 <= code_min && code_max <= 127) || (0 <= code_min && code_max <= 255), "code_min is ", code_min,
              " and code_max is ", code_max, ", must fit int8 or uint8");
  return code_max > 127 ? at::kByte : at::kChar;
}
void quantize_out(const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point, Constants grid,
                  int64_t code_min, int64_t code_max, Tensor out) {
  check_output("out", out, w, code_type(code_min, code_max));
  const Held held(w, scale, zero_point, std::nullopt, grid);
  const QuantizeCall call{held.args, out.mutable_data_ptr(), static_cast<int32_t>(code_min),
                          static_cast<int32_t>(code_max)};
  run(call, held.device());
}
Tensor quantize(const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point, Constants grid,
                int64_t code_min, int64_t code_max) {
  Tensor out = like(w, code_type(code_min, code_max));
  quantize_out(w, scale, zero_point, grid, code_min, code_max, out);
  return out;
}

void dequantize_out(const Tensor& codes, const Tensor& scale, const OptionalTensor& zero_point, Constants grid,
                    at::ScalarType dtype, Tensor out) {
  TORCH_CHECK(codes.scalar_type() == at::kChar || codes.scalar_type() == at::kByte, "codes is ",
              name_of(codes.scalar_type()), ", must be int8 or uint8");
  check_output("out", out, codes, dtype);
  TORCH_CHECK(scale.scalar_type() == at::kFloat || dtype == at::kDouble, "scale is ", name_of(scale.scalar_type()),
              ", must be torch.float32 (torch.float64 is allowed with a float64 dtype)");
  const Held held(codes, scale, zero_point, std::nullopt, grid);
  const DequantizeCall call{held.args, held.args.w, codes.scalar_type() == at::kByte, out.mutable_data_ptr(),
                            dtype_of("out", out)};
  run(call, held.device());
}
Tensor dequantize(const Tensor& codes, const Tensor& scale, const OptionalTensor& zero_point, Constants grid,
                  at::ScalarType dtype) {
  Tensor out = like(codes, dtype);
  dequantize_out(codes, scale, zero_point, grid, dtype, out);
  return out;
}

Tensor fake_quantize_dynamic(const Tensor& x, int64_t bits) {
  Tensor out = like(x);
  fake_quantize_dynamic_out(x, bits, out);
  return out;
}

void normal_out(const Tensor& seed, int64_t numel, int64_t stream, Tensor out) {
  TORCH_CHECK(seed.scalar_type() == at::kLong && seed.numel() == 1, "seed must be an int64 tensor with one element");
  TORCH_CHECK(out.is_contiguous() && out.scalar_type() == at::kFloat && out.dim() == 1 && out.numel() == numel,
              "out must be a contiguous float32 tensor with ", numel, " elements");
  check_device("out", out, seed.device());
  const NormalCall call{seed.const_data_ptr<int64_t>(), out.mutable_data_ptr<float>(), numel,
                        static_cast<uint32_t>(stream)};
  run(call, seed.device());
}
Tensor normal(const Tensor& seed, int64_t numel, int64_t stream) {
  TORCH_CHECK(numel >= 0, "numel is ", numel, ", must not be negative");
  Tensor out = allocate({numel}, at::kFloat, seed.device());
  normal_out(seed, numel, stream, out);
  return out;
}

}  // namespace

void add_fake_quantize(Ops& ops) {
  QK_OP(ops, fake_quantize);
  QK_OP(ops, fake_quantize_out);
  QK_OP(ops, fake_quantize_backward);
  QK_OP(ops, fake_quantize_backward_out);
  QK_OP(ops, fake_quantize_jvp);
  QK_OP(ops, fake_quantize_jvp_out);
  QK_CPU_OP(ops, fake_quantize_dual);
  QK_CPU_OP(ops, fake_quantize_dual_out);
  QK_OP(ops, quantize);
  QK_OP(ops, quantize_out);
  QK_OP(ops, dequantize);
  QK_OP(ops, dequantize_out);
  QK_OP(ops, fake_quantize_dynamic);
  QK_OP(ops, fake_quantize_dynamic_out);
  QK_OP(ops, normal);
  QK_OP(ops, normal_out);
}

}  // namespace qk
