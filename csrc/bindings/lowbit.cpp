// Packing, and products with packed weights.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <vector>

#include "../common/packing.h"
#include "../cpu/kernels.h"
#include "tensors.h"
#if defined(QK_WITH_CUDA)
#include "../cuda/bindings.h"
#endif

namespace qk {
namespace {

void check_bits(int64_t code_min, int64_t bits) {
  TORCH_CHECK(1 <= bits && bits <= 8, "bits is ", bits, ", must be 1 to 8");
  TORCH_CHECK(code_min == 0 || (-128 <= code_min && code_min <= std::min<int64_t>(0, 128 - (1 << bits))),
              "code_min is ", code_min, ", must be 0, or at least -128 with ", bits, " bits that end at 127 at most");
}
void check_cpu(const char* name, const Tensor& t) {
  TORCH_CHECK(t.device().is_cpu(), name, " is on ", t.device(), ", must be on a CPU");
}
std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes = t.sizes().vec();
  sizes.back() = last;
  return sizes;
}
void check_shape(const char* name, const Tensor& t, at::IntArrayRef sizes, at::ScalarType type) {
  TORCH_CHECK(t.sizes() == sizes && t.scalar_type() == type && t.is_contiguous(), name, " is ",
              name_of(t.scalar_type()), " of shape ", shown(t), ", must be contiguous ", name_of(type), " of shape ",
              shown(sizes));
}

void pack_out(const Tensor& codes_, int64_t code_min, int64_t bits, Tensor out) {
  check_bits(code_min, bits);
  TORCH_CHECK(codes_.dim() > 0, "codes has no dimension, must have at least one");
  TORCH_CHECK(codes_.scalar_type() == at::kChar || codes_.scalar_type() == at::kByte, "codes is ",
              name_of(codes_.scalar_type()), ", must be int8 or uint8");
  check_cpu("codes", codes_);
  const Tensor codes = codes_.contiguous();
  const int64_t cols = codes.size(-1), rows = cols ? codes.numel() / cols : 0;
  check_shape("out", out, with_last(codes, row_bytes(cols, static_cast<int>(bits))), at::kByte);
  const PackCall call{codes.const_data_ptr(),         out.mutable_data_ptr<uint8_t>(), rows, cols,
                      static_cast<int32_t>(code_min), static_cast<int32_t>(bits)};
  parallel(
      rows, [&](int64_t begin, int64_t end) { kernels().pack(call, begin, end); },
      std::max<int64_t>(1, kUnitElements / std::max<int64_t>(cols, 1)));
}
Tensor pack(const Tensor& codes, int64_t code_min, int64_t bits) {
  check_bits(code_min, bits);
  TORCH_CHECK(codes.dim() > 0, "codes has no dimension, must have at least one");
  Tensor out = allocate(with_last(codes, row_bytes(codes.size(-1), static_cast<int>(bits))), at::kByte, codes.device());
  pack_out(codes, code_min, bits, out);
  return out;
}

at::ScalarType unpacked_type(int64_t code_min, int64_t bits) {
  check_bits(code_min, bits);
  return code_min + (1 << bits) - 1 > 127 ? at::kByte : at::kChar;
}
void unpack_out(const Tensor& packed_, int64_t code_min, int64_t bits, int64_t cols, Tensor out) {
  const auto type = unpacked_type(code_min, bits);
  TORCH_CHECK(packed_.scalar_type() == at::kByte, "packed is ", name_of(packed_.scalar_type()),
              ", must be torch.uint8");
  TORCH_CHECK(packed_.dim() > 0 && cols >= 0 && packed_.size(-1) == row_bytes(cols, static_cast<int>(bits)),
              "packed has shape ", shown(packed_), ", must end in ", row_bytes(cols, static_cast<int>(bits)), " for ",
              cols, " columns");
  check_cpu("packed", packed_);
  const Tensor packed = packed_.contiguous();
  check_shape("out", out, with_last(packed, cols), type);
  const int64_t rows = cols ? out.numel() / cols : 0;
  const UnpackCall call{packed.const_data_ptr<uint8_t>(), out.mutable_data_ptr(),    rows, cols,
                        static_cast<int32_t>(code_min),   static_cast<int32_t>(bits)};
  parallel(
      rows, [&](int64_t begin, int64_t end) { kernels().unpack(call, begin, end); },
      std::max<int64_t>(1, kUnitElements / std::max<int64_t>(cols, 1)));
}
Tensor unpack(const Tensor& packed, int64_t code_min, int64_t bits, int64_t cols) {
  TORCH_CHECK(cols >= 0, "cols is ", cols, ", must not be negative");
  TORCH_CHECK(packed.dim() > 0, "packed has shape ", shown(packed), ", must have a dimension");
  Tensor out = allocate(with_last(packed, cols), unpacked_type(code_min, bits), packed.device());
  unpack_out(packed, code_min, bits, cols, out);
  return out;
}

// A weight, checked, in the fields of a call that describe it, and the tensors they point into.
struct Weight {
  LowbitLinearCall call{};
  Tensor packed, scale, zero_point, offsets;
  std::vector<Expert> experts;  // that have tokens

  Weight(const char* name, const Tensor& x, const Tensor& packed_, const Tensor& scale_,
         const OptionalTensor& zero_point_, const OptionalTensor& offsets_, Constants grid, int64_t code_min,
         int64_t bits, int64_t cols)
      : packed(packed_.contiguous()), scale(scale_.contiguous()) {
    check_bits(code_min, bits);
    const int64_t dims = offsets_ ? 3 : 2;
    dtype_of(name, x);
    TORCH_CHECK(x.dim() >= 1, name, " has no dimension, must have at least one");
    TORCH_CHECK(packed.scalar_type() == at::kByte && packed.dim() == dims &&
                    packed.size(-1) == row_bytes(cols, static_cast<int>(bits)),
                "packed is ", name_of(packed.scalar_type()), " of shape ", shown(packed), ", must be torch.uint8 with ",
                dims, " dimensions, the last ", row_bytes(cols, static_cast<int>(bits)), " for ", cols, " columns at ",
                bits, " bits");
    TORCH_CHECK(scale.dim() == dims && scale.sizes().slice(0, dims - 1) == packed.sizes().slice(0, dims - 1) &&
                    scale.size(-1) >= 1 && cols % scale.size(-1) == 0,
                "scale has shape ", shown(scale), ", must be ", shown(packed.sizes().slice(0, dims - 1)),
                " and a divisor of ", cols);
    TORCH_CHECK(
        scale.scalar_type() == at::kFloat || scale.scalar_type() == at::kBFloat16 || scale.scalar_type() == at::kHalf,
        "scale is ", name_of(scale.scalar_type()), ", must be a 16 or 32-bit float");
    const auto constants = grid_of(grid);
    call.rows = packed.size(-2);
    call.experts = offsets_ ? packed.size(0) : 1;
    call.cols = cols;
    call.groups = scale.size(-1);
    call.packed = packed.const_data_ptr<uint8_t>();
    call.scale = scale.const_data_ptr();
    call.scale_type = dtype_of("scale", scale);
    call.steps = constants.steps;
    call.offset = constants.offset;
    call.code_min = static_cast<int32_t>(code_min);
    call.bits = static_cast<int32_t>(bits);
    call.tokens = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
    if (zero_point_) {
      zero_point = zero_point_->contiguous();
      TORCH_CHECK(zero_point.sizes() == scale.sizes() && zero_point.scalar_type() == at::kFloat,
                  "zero_point must be torch.float32 of shape ", shown(scale), " like scale");
      call.zero_point = zero_point.const_data_ptr<float>();
    }
    for (const Tensor* t : {&packed, &scale, &zero_point})
      if (t->defined()) check_device("packed weight", *t, x.device());
    if (!offsets_) {
      if (call.tokens) experts.push_back({0, 0, call.tokens});
      return;
    }
    offsets = offsets_->contiguous();
    check_offsets(offsets, call.experts);
    TORCH_CHECK(x.dim() == 2, name, " has shape ", shown(x), ", must have two dimensions with offsets");
    check_device("offsets", offsets, x.device());
    call.offsets = offsets.const_data_ptr<int32_t>();
    if (x.is_cpu()) experts = experts_of(offsets, call.tokens, name);  // elsewhere looking would wait for the device
  }

  // Rows of a result that no expert writes.
  void clear_rest(const Tensor& y) const {
    const int64_t written = experts.empty() ? 0 : experts.back().last;
    if (written < call.tokens) y.narrow(0, written, call.tokens - written).zero_();
  }
  // The numbers of an expert, [rows, cols].
  Tensor numbers(int64_t expert, at::ScalarType type) const {
    const bool wide = type == at::kDouble;
    const Tensor w = allocate({call.rows, call.cols}, wide ? at::kFloat : type, packed.device());
    LowbitLinearCall one = call;
    const int64_t row = expert * call.rows;
    one.packed += row * packed.size(-1);
    one.scale = static_cast<const char*>(call.scale) + row * call.groups * scale.element_size();
    if (one.zero_point) one.zero_point += row * call.groups;
    parallel(
        call.cols ? call.rows : 0,
        [&](int64_t begin, int64_t end) {
          kernels().dequantize_packed(one, w.mutable_data_ptr(), dtype_of("w", w), begin, end);
        },
        std::max<int64_t>(1, kUnitElements / std::max<int64_t>(call.cols, 1)));
    return wide ? w.to(at::kDouble) : w;
  }
};

// y = x W^T + bias or x W by the library's product, from unpacked weights: float32 also where x has 16 bits, or their
// numbers would be rounded. The library adds in an order that may depend on the number of threads.
void multiply_numbers(const Weight& w, const Tensor& x, const Tensor& y, bool transposed, const Tensor& bias) {
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const Expert& e : w.experts) {
    const Tensor from = x.slice(0, e.first, e.last).to(type), to = y.slice(0, e.first, e.last);
    const Tensor numbers = w.numbers(e.index, type), factor = transposed ? numbers.t() : numbers;
    Tensor sums = to.scalar_type() == type ? to : allocate(to.sizes(), type, to.device());
    at::mm_out(sums, from, factor);
    if (bias.defined()) sums.add_(bias.to(type));
    if (!sums.is_same(to)) to.copy_(sums);
  }
}

// Fills in what a product has beside the weight; returns the bias that the call points into.
Tensor add_operands(LowbitLinearCall& call, const Tensor& x, const OptionalTensor& bias_, bool grouped,
                    std::optional<int64_t> act_bits) {
  TORCH_CHECK(!act_bits || (2 <= *act_bits && *act_bits <= 8), "act_bits is ", act_bits.value_or(0),
              ", must be None or 2 to 8");
  call.act_bits = static_cast<int32_t>(act_bits.value_or(0));
  call.x = x.const_data_ptr();
  call.x_type = dtype_of("x", x);
  if (!bias_) return Tensor();
  Tensor bias = bias_->contiguous();
  TORCH_CHECK(!grouped, "bias must be None with offsets");
  TORCH_CHECK(bias.dim() == 1 && bias.size(0) == call.rows && bias.is_floating_point() && bias.device() == x.device(),
              "bias is ", name_of(bias.scalar_type()), " of shape ", shown(bias), " on ", bias.device(),
              ", must be floating point of shape (", call.rows, ",) on ", x.device());
  if (x.scalar_type() != at::kDouble && bias.scalar_type() == at::kDouble) bias = bias.to(at::kFloat);
  call.bias_type = dtype_of("bias", bias);
  call.bias = bias.const_data_ptr();
  return bias;
}

#if defined(QK_WITH_CUDA)
// Whether the CUDA kernel takes a call of lowbit_linear; what it does not take is another implementation's.
bool lowbit_linear_serves(const Tensor& x_, const Tensor& packed, const Tensor& scale, const OptionalTensor& zero_point,
                          const OptionalTensor& bias_, const OptionalTensor& offsets, Constants grid, int64_t code_min,
                          int64_t bits, std::optional<int64_t> act_bits) {
  TORCH_CHECK(x_.dim() >= 1, "x has no dimension, must have at least one");
  const Tensor x = x_.contiguous();
  Weight w("x", x, packed, scale, zero_point, offsets, grid, code_min, bits, x.size(-1));
  const Tensor bias = add_operands(w.call, x, bias_, offsets.has_value(), act_bits);
  return cuda::can_run(w.call);
}
#endif

void lowbit_linear_out(const Tensor& x_, const Tensor& packed, const Tensor& scale, const OptionalTensor& zero_point,
                       const OptionalTensor& bias_, const OptionalTensor& offsets, Constants grid, int64_t code_min,
                       int64_t bits, std::optional<int64_t> act_bits, Tensor out) {
  TORCH_CHECK(x_.dim() >= 1, "x has no dimension, must have at least one");
  const Tensor x = x_.contiguous();
  const int64_t cols = x.size(-1);
  Weight w("x", x, packed, scale, zero_point, offsets, grid, code_min, bits, cols);
  check_shape("out", out, with_last(x, w.call.rows), x.scalar_type());
  LowbitLinearCall& call = w.call;
  const Tensor bias = add_operands(call, x, bias_, offsets.has_value(), act_bits);
  call.y = out.mutable_data_ptr();
#if defined(QK_WITH_CUDA)
  if (x.is_cuda()) {
    if (out.numel() == 0) return;
    TORCH_CHECK(cuda::can_run(call),
                "the CUDA kernel takes at most 8 tokens of one expert, and no torch.float64; x is ",
                name_of(x.scalar_type()), " of shape ", shown(x), offsets ? " with offsets" : "");
    return cuda::run(call, x.device());
  }
#endif
  check_cpu("x", x);
  const Tensor y = out.view({call.tokens, call.rows});
  w.clear_rest(y);
  if (out.numel() == 0) return;
  if (call.x_type == DType::f64) {
    Tensor from = x;
    if (act_bits) fake_quantize_dynamic_out(x, *act_bits, from = like(x));
    multiply_numbers(w, from.view({call.tokens, cols}), y, true, bias);
    return;
  }
  const LowbitPlan plan = kernels().lowbit_plan(call);
  const Tensor memory = allocate({plan.buffer_bytes + 64}, at::kByte, x.device());
  void* const at =
      reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.mutable_data_ptr()) + 63) & ~uintptr_t{63});
  parallel(
      call.tokens, [&](int64_t begin, int64_t end) { kernels().lowbit_prepare(plan, at, begin, end); },
      std::max<int64_t>(1, kUnitElements / std::max<int64_t>(cols, 1)));
  const auto multiply = [&](int64_t begin, int64_t end) {
    kernels().lowbit_multiply(plan, at, w.experts.data(), begin, end);
  };
  const int64_t panels = static_cast<int64_t>(w.experts.size()) * ((call.rows + kPanel - 1) / kPanel);
  if (offsets)
    parallel_in_turn(panels, multiply);
  else
    parallel(panels, multiply);
}
Tensor lowbit_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const OptionalTensor& zero_point,
                     const OptionalTensor& bias, const OptionalTensor& offsets, Constants grid, int64_t code_min,
                     int64_t bits, std::optional<int64_t> act_bits) {
  TORCH_CHECK(x.dim() >= 1, "x has no dimension, must have at least one");
  TORCH_CHECK(packed.dim() >= 2, "packed has shape ", shown(packed), ", must have two dimensions, three with offsets");
  Tensor out = allocate(with_last(x, packed.size(-2)), x.scalar_type(), x.device());
  lowbit_linear_out(x, packed, scale, zero_point, bias, offsets, grid, code_min, bits, act_bits, out);
  return out;
}

void lowbit_linear_transposed_out(const Tensor& g_, const Tensor& packed, const Tensor& scale,
                                  const OptionalTensor& zero_point, const OptionalTensor& offsets, Constants grid,
                                  int64_t code_min, int64_t bits, int64_t cols, Tensor out) {
  const Tensor g = g_.contiguous();
  const Weight w("g", g, packed, scale, zero_point, offsets, grid, code_min, bits, cols);
  TORCH_CHECK(g.size(-1) == w.call.rows, "g has shape ", shown(g), ", its last dimension must be ", w.call.rows);
  check_cpu("g", g);
  check_shape("out", out, with_last(g, cols), g.scalar_type());
  const Tensor to = out.view({w.call.tokens, cols}), from = g.view({w.call.tokens, w.call.rows});
  w.clear_rest(to);
  if (out.numel() == 0) return;
  multiply_numbers(w, from, to, false, Tensor());
}
Tensor lowbit_linear_transposed(const Tensor& g, const Tensor& packed, const Tensor& scale,
                                const OptionalTensor& zero_point, const OptionalTensor& offsets, Constants grid,
                                int64_t code_min, int64_t bits, int64_t cols) {
  TORCH_CHECK(g.dim() >= 1, "g has no dimension, must have at least one");
  Tensor out = allocate(with_last(g, cols), g.scalar_type(), g.device());
  lowbit_linear_transposed_out(g, packed, scale, zero_point, offsets, grid, code_min, bits, cols, out);
  return out;
}

}  // namespace

void add_lowbit(Ops& ops) {
  QK_CPU_OP(ops, pack);
  QK_CPU_OP(ops, pack_out);
  QK_CPU_OP(ops, unpack);
  QK_CPU_OP(ops, unpack_out);
#if defined(QK_WITH_CUDA)
  QK_CUDA_OP(ops, lowbit_linear_serves);
#endif
  QK_OP(ops, lowbit_linear);
  QK_OP(ops, lowbit_linear_out);
  QK_CPU_OP(ops, lowbit_linear_transposed);
  QK_CPU_OP(ops, lowbit_linear_transposed_out);
}

}  // namespace qk
