// The one file that sees torch: checks what a kernel relies on, allocates, divides work among torch's threads.
//
// Shapes and dtypes are the business of the fake rules in qatkernels/ops; what is checked here is what memory safety
// needs. Schemas come from Python (`register`), so that there is one of each.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "build_info.h"
#include "common/call.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#if defined(QK_WITH_CUDA)
#include "cuda/bindings.h"
#endif

namespace qk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<at::ScalarType>;
using Constants = at::ArrayRef<double>;

std::string name_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "torch.float32";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kHalf:
      return "torch.float16";
    case at::kDouble:
      return "torch.float64";
    case at::kChar:
      return "torch.int8";
    case at::kByte:
      return "torch.uint8";
    case at::kInt:
      return "torch.int32";
    case at::kLong:
      return "torch.int64";
    default:
      return std::string("torch.") + c10::toString(type);
  }
}

DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    case at::kDouble:
      return DType::f64;
    default:
      TORCH_CHECK(false, name, " is ", name_of(t.scalar_type()),
                  ", must be torch.float32, torch.bfloat16, torch.float16 or torch.float64");
  }
}

// A new contiguous tensor; on a CPU from the pool, so that weight-sized results do not fault in fresh pages at every
// step.
Tensor allocate(at::IntArrayRef sizes, at::ScalarType type, at::Device device) {
  const int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(type));
  const auto options = at::TensorOptions().dtype(type).device(device);
  if (!device.is_cpu() || bytes < cpu::kPooledBytes) return at::empty(sizes, options);
  void* const p = cpu::pool_take(bytes);
  return at::for_blob(p, sizes).deleter([bytes](void* q) { cpu::pool_give(q, bytes); }).options(options).make_tensor();
}
Tensor like(const Tensor& t, OptionalType type = std::nullopt) {
  return allocate(t.sizes(), type.value_or(t.scalar_type()), t.device());
}

// ---- running a call where its tensors are

template <class F>
void parallel(int64_t units, F f) {
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) { f(begin, end); });
}
int64_t units_of(const Point& at) { return at.rows > 0 && at.cols > 0 ? Units(at.rows, at.cols).count() : 0; }

void run_on_cpu(const Forward& call) {
  parallel(units_of(call.at), [&](int64_t begin, int64_t end) { kernels().forward(call, begin, end); });
}
void run_on_cpu(const Backward& call) {
  const Units units(call.at.rows, call.at.cols);
  std::vector<double> partial(units.pieces_per_row > 1 ? 2 * units.rows * units.pieces_per_row : 0);
  parallel(units_of(call.at),
           [&](int64_t begin, int64_t end) { kernels().backward(call, partial.data(), begin, end); });
  kernels().finish_backward(call, partial.data());
}
void run_on_cpu(const Jvp& call) {
  parallel(units_of(call.at), [&](int64_t begin, int64_t end) { kernels().jvp(call, begin, end); });
}
void run_on_cpu(const Quantize& call) {
  parallel(units_of(call.at), [&](int64_t begin, int64_t end) { kernels().quantize(call, begin, end); });
}
void run_on_cpu(const Dequantize& call) {
  parallel(units_of(call.at), [&](int64_t begin, int64_t end) { kernels().dequantize(call, begin, end); });
}
void run_on_cpu(const Dynamic& call) {
  at::parallel_for(0, call.rows, std::max<int64_t>(1, kUnitElements / std::max<int64_t>(call.cols, 1)),
                   [&](int64_t begin, int64_t end) { kernels().dynamic(call, begin, end); });
}
void run_on_cpu(const Normal& call) {
  parallel((call.numel + kNoiseSpan - 1) / kNoiseSpan,
           [&](int64_t begin, int64_t end) { kernels().normal(call, begin, end); });
}

template <class Call>
void run(const Call& call, at::Device device) {
#if defined(QK_WITH_CUDA)
  if (device.is_cuda()) return cuda::run(call, device);
#endif
  TORCH_CHECK(device.is_cpu(), "no kernels for ", device, " in this build");
  run_on_cpu(call);
}

// ---- the ops

Grid<double> grid_of(Constants c) {
  TORCH_CHECK(c.size() == 10, "grid has ", c.size(), " constants, must be Grid.constants");
  return {c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[0] != 0};
}

void check_device(const char* name, const Tensor& t, at::Device device) {
  TORCH_CHECK(t.device() == device, name, " is on ", t.device(), ", must be on ", device, " like the others");
}

// A Point and the contiguous tensors it points into.
struct Held {
  Point at{};
  Tensor w, scale, zero_point, seed;

  Held(const Tensor& w_, const Tensor& scale_, const OptionalTensor& zero_point_, const OptionalTensor& seed_,
       Constants grid, double noise_std = 0, double scale_noise_std = 0, double grad_scale = 1)
      : w(w_.contiguous()), scale(scale_.contiguous()) {
    const bool codes = w.scalar_type() == at::kChar || w.scalar_type() == at::kByte;
    if (!codes) at.w_type = dtype_of("w", w);
    TORCH_CHECK(scale.scalar_type() == at::kFloat ||
                    (scale.scalar_type() == at::kDouble && w.scalar_type() == at::kDouble) ||
                    (scale.scalar_type() == at::kDouble && codes),
                "scale is ", name_of(scale.scalar_type()),
                ", must be torch.float32 (torch.float64 is allowed with a float64 w)");
    TORCH_CHECK(w.numel() == 0 || (scale.numel() > 0 && w.numel() % scale.numel() == 0), "scale has ", scale.numel(),
                " elements, must divide the ", w.numel(), " elements of w");
    check_device("scale", scale, w.device());
    at.rows = scale.numel();
    at.cols = at.rows ? w.numel() / at.rows : 0;
    at.w = w.const_data_ptr();
    at.scale = scale.const_data_ptr();
    at.scale_type = scale.scalar_type() == at::kDouble ? DType::f64 : DType::f32;
    if (zero_point_) {
      zero_point = zero_point_->contiguous();
      TORCH_CHECK(zero_point.numel() == scale.numel() && zero_point.scalar_type() == scale.scalar_type(),
                  "zero_point is ", name_of(zero_point.scalar_type()), " of shape ", zero_point.sizes(),
                  ", must be like scale");
      check_device("zero_point", zero_point, w.device());
      at.zero_point = zero_point.const_data_ptr();
    }
    if (seed_) {
      seed = seed_->contiguous();
      TORCH_CHECK(seed.scalar_type() == at::kLong && seed.numel() == 1,
                  "seed must be an int64 tensor with one element");
      check_device("seed", seed, w.device());
      at.seed = seed.const_data_ptr<int64_t>();
    }
    at.grid = grid_of(grid);
    at.noise_std = noise_std;
    at.scale_noise_std = scale_noise_std;
    at.grad_scale = grad_scale;
  }
  at::Device device() const { return w.device(); }
};

void check_output(const char* name, const Tensor& out, const Tensor& shaped, at::ScalarType type) {
  check_device(name, out, shaped.device());
  TORCH_CHECK(out.is_contiguous() && out.sizes() == shaped.sizes() && out.scalar_type() == type, name, " is ",
              name_of(out.scalar_type()), " of shape ", out.sizes(), ", must be contiguous ", name_of(type),
              " of shape ", shaped.sizes());
}
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
  const Forward call{held.at, out.mutable_data_ptr(), dtype_of("out", out)};
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
  const Backward call{held.at,
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
  const auto tangent = [](const char* name, const OptionalTensor& t, const Tensor& of) {
    if (!t) return Tensor();
    TORCH_CHECK(t->sizes() == of.sizes() && t->scalar_type() == of.scalar_type(), name,
                " must have the shape and dtype of what it is the tangent of");
    check_device(name, *t, of.device());
    return t->contiguous();
  };
  const Tensor tw = tangent("tangent_w", tangent_w, w), ts = tangent("tangent_scale", tangent_scale, scale),
               tz = tangent("tangent_zero_point", tangent_zero_point, scale);
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  const Jvp call{held.at, pointer(tw), pointer(ts), pointer(tz), out.mutable_data_ptr(), dtype_of("out", out)};
  run(call, held.device());
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

at::ScalarType code_type(int64_t code_min, int64_t code_max) {
  TORCH_CHECK((-128 <= code_min && code_max <= 127) || (0 <= code_min && code_max <= 255), "code_min is ", code_min,
              " and code_max is ", code_max, ", must fit int8 or uint8");
  return code_max > 127 ? at::kByte : at::kChar;
}
void quantize_out(const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point, Constants grid,
                  int64_t code_min, int64_t code_max, Tensor out) {
  check_output("out", out, w, code_type(code_min, code_max));
  const Held held(w, scale, zero_point, std::nullopt, grid);
  const Quantize call{held.at, out.mutable_data_ptr(), static_cast<int32_t>(code_min), static_cast<int32_t>(code_max)};
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
  const Dequantize call{held.at, held.at.w, codes.scalar_type() == at::kByte, out.mutable_data_ptr(),
                        dtype_of("out", out)};
  run(call, held.device());
}
Tensor dequantize(const Tensor& codes, const Tensor& scale, const OptionalTensor& zero_point, Constants grid,
                  at::ScalarType dtype) {
  Tensor out = like(codes, dtype);
  dequantize_out(codes, scale, zero_point, grid, dtype, out);
  return out;
}

void fake_quantize_dynamic_out(const Tensor& x_, int64_t bits, Tensor out) {
  TORCH_CHECK(x_.dim() > 0, "x has no dimension, must have at least one");
  TORCH_CHECK(2 <= bits && bits <= 8, "bits is ", bits, ", must be 2 to 8");
  check_output("out", out, x_, x_.scalar_type());
  const Tensor x = x_.contiguous();
  const int64_t cols = x.size(-1), rows = cols ? x.numel() / cols : 0;
  const Dynamic call{x.const_data_ptr(), out.mutable_data_ptr(),    rows, cols,
                     dtype_of("x", x),   static_cast<int32_t>(bits)};
  run(call, x.device());
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
  const Normal call{seed.const_data_ptr<int64_t>(), out.mutable_data_ptr<float>(), numel,
                    static_cast<uint32_t>(stream)};
  run(call, seed.device());
}
Tensor normal(const Tensor& seed, int64_t numel, int64_t stream) {
  TORCH_CHECK(numel >= 0, "numel is ", numel, ", must not be negative");
  Tensor out = allocate({numel}, at::kFloat, seed.device());
  normal_out(seed, numel, stream, out);
  return out;
}

using Maker = torch::CppFunction (*)();
#define QK_OP(name) {#name, [] { return torch::CppFunction(TORCH_FN(name)); }}
const std::map<std::string, Maker>& ops() {
  static const std::map<std::string, Maker> ops{
      QK_OP(fake_quantize),
      QK_OP(fake_quantize_out),
      QK_OP(fake_quantize_backward),
      QK_OP(fake_quantize_backward_out),
      QK_OP(fake_quantize_jvp),
      QK_OP(fake_quantize_jvp_out),
      QK_OP(quantize),
      QK_OP(quantize_out),
      QK_OP(dequantize),
      QK_OP(dequantize_out),
      QK_OP(fake_quantize_dynamic),
      QK_OP(fake_quantize_dynamic_out),
      QK_OP(normal),
      QK_OP(normal_out),
  };
  return ops;
}
#undef QK_OP

// Registrations live as long as the process, as those of TORCH_LIBRARY do.
torch::Library& library(torch::Library::Kind kind, const std::string& ns, std::optional<c10::DispatchKey> key) {
  static auto& libraries = *new std::vector<std::unique_ptr<torch::Library>>;
  libraries.push_back(std::make_unique<torch::Library>(kind, ns, key, __FILE__, __LINE__));
  return *libraries.back();
}

void implement(const std::string& ns, const std::string& op, c10::DispatchKey key) {
  const auto found = ops().find(op);
  TORCH_CHECK(found != ops().end(), "no kernel for ", op);
  library(torch::Library::IMPL, ns, key).impl(op.c_str(), found->second());
}

// Declares an op by its schema in a namespace of this extension's own and implements it on every device built for.
void declare(const std::string& ns, const std::string& op, const std::string& schema) {
  library(torch::Library::FRAGMENT, ns, std::nullopt).def(torch::schema(schema.c_str()));
  implement(ns, op, c10::DispatchKey::CPU);
#if defined(QK_WITH_CUDA)
  implement(ns, op, c10::DispatchKey::CUDA);
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = QK_VERSION;
  info["torch"] = QK_TORCH_VERSION;
  info["cxx_compiler"] = QK_CXX_COMPILER;
  info["cuda_compiler"] = QK_CUDA_COMPILER;
  info["cuda_archs"] = QK_CUDA_ARCHS;
  info["isas"] = compiled_isas();
  info["isa"] = kernels().isa;
  return info;
}

}  // namespace
}  // namespace qk

PYBIND11_MODULE(_C, m) {
  m.def("declare", &qk::declare, "Declare an op by its schema in a namespace of the extension, implemented.");
  m.def(
      "implement",
      [](const std::string& ns, const std::string& op, const std::string& device) {
        qk::implement(ns, op, c10::parseDispatchKey(device));
      },
      "Serve an op of a namespace on a device (\"CPU\" or \"CUDA\") with this extension's kernel.");
  m.def("build_info", &qk::build_info, "Compilers, ISAs, CUDA architectures and versions of this build.");
  m.def("empty_cache", &qk::cpu::pool_clear, "Return the memory kept for reuse to the system.");
  m.def("cached_bytes", &qk::cpu::pool_cached_bytes, "Bytes kept for reuse.");
}
