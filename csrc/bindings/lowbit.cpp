// Products with packed weights.
#include "../cpu/lowbit.h"

#include <ATen/ops/mm.h>

#include <vector>

#include "../cpu/packing.h"
#include "dynamic.h"
#include "gpu.h"
#include "registry.h"
#include "tensors.h"
#include "text.h"
#if defined(QK_WITH_CUDA)
#include "../cuda/lowbit_linear.h"
#endif

namespace qk {
namespace {

// The fields of a call that describe the packed weight, and the experts that have tokens.
struct Weight {
  LowbitLinearCall call{};
  Tensor packed, scale;
  std::vector<Expert> experts;

  // `name` is the name of x in messages.
  Weight(const char* name, const Tensor& x, const Tensor& packed_, const Tensor& scale_,
         const OptionalTensor& zero_point, const OptionalTensor& offsets, Constants grid, int64_t code_min,
         int64_t bits, int64_t cols)
      : packed(packed_), scale(scale_) {
    const auto constants = grid_of(grid);
    call.rows = packed.size(-2);
    call.experts = offsets ? packed.size(0) : 1;
    call.cols = cols;
    call.groups = scale.size(-1);
    call.packed = packed.const_data_ptr<uint8_t>();
    call.scale = scale.const_data_ptr();
    call.scale_type = dtype_of(scale);
    call.zero_point = zero_point ? zero_point->const_data_ptr<float>() : nullptr;
    call.offsets = offsets ? offsets->const_data_ptr<int32_t>() : nullptr;
    call.steps = constants.steps;
    call.offset = constants.offset;
    call.code_min = static_cast<int32_t>(code_min);
    call.bits = static_cast<int32_t>(bits);
    call.tokens = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
    if (!offsets && call.tokens) experts.push_back({0, 0, call.tokens});
    // Reading offsets on a GPU would synchronize with it.
    if (offsets && x.is_cpu()) experts = experts_of(*offsets, call.tokens, name);
  }

  // Sets the rows that belong to no expert to zero.
  void clear_rest(const Tensor& y) const {
    const int64_t written = experts.empty() ? 0 : experts.back().last;
    if (written < call.tokens) y.narrow(0, written, call.tokens - written).zero_();
  }
  // The dequantized weight of an expert, [rows, cols].
  Tensor dequantized(int64_t expert, at::ScalarType type) const {
    const bool wide = type == at::kDouble;
    const Tensor w = allocate({call.rows, call.cols}, wide ? at::kFloat : type, packed.device());
    LowbitLinearCall one = call;
    const int64_t row = expert * call.rows;
    one.packed += row * packed.size(-1);
    one.scale = static_cast<const char*>(call.scale) + row * call.groups * scale.element_size();
    if (one.zero_point) one.zero_point += row * call.groups;
    at::parallel_for(0, call.cols ? call.rows : 0, grain_of_rows(call.cols), [&](int64_t begin, int64_t end) {
      cpu::dequantize_packed(one, w.mutable_data_ptr(), dtype_of(w), begin, end);
    });
    return wide ? w.to(at::kDouble) : w;
  }
};

// y = x W^T + bias or x W: dequantizes the weight and calls at::mm. For 16-bit x it computes in float32, because 16
// bits would round the weight. The order of at::mm's sums may depend on the number of threads.
void multiply_dequantized(const Weight& w, const Tensor& x, const Tensor& y, bool transposed, const Tensor& bias) {
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const Expert& e : w.experts) {
    const Tensor from = x.slice(0, e.first, e.last).to(type), to = y.slice(0, e.first, e.last);
    const Tensor values = w.dequantized(e.index, type), factor = transposed ? values.t() : values;
    Tensor sums = to.scalar_type() == type ? to : allocate(to.sizes(), type, to.device());
    at::mm_out(sums, from, factor);
    if (bias.defined()) sums.add_(bias.to(type));
    if (!sums.is_same(to)) to.copy_(sums);
  }
}

// Fills in the fields of x, the bias and act_bits. Returns the bias, which the caller must keep alive: call.bias points
// into it.
Tensor add_operands(LowbitLinearCall& call, const Tensor& x, const OptionalTensor& bias_,
                    std::optional<int64_t> act_bits) {
  call.act_bits = static_cast<int32_t>(act_bits.value_or(0));
  call.x = x.const_data_ptr();
  call.x_type = dtype_of(x);
  if (!bias_) return Tensor();
  const bool narrows = x.scalar_type() != at::kDouble && bias_->scalar_type() == at::kDouble;
  const Tensor bias = narrows ? bias_->to(at::kFloat) : *bias_;
  call.bias_type = dtype_of(bias);
  call.bias = bias.const_data_ptr();
  return bias;
}

#if defined(QK_WITH_CUDA)
// Whether the CUDA kernel takes a call of lowbit_linear. Other calls go to the next backend, which is faster with codes
// of 8 bits: 93 us against 106 to 115 for a weight of 8192 x 28672 on an H100.
bool lowbit_linear_serves(const Tensor& x, const Tensor& packed, const Tensor& scale, const OptionalTensor& zero_point,
                          const OptionalTensor& bias_, const OptionalTensor& offsets, Constants grid, int64_t code_min,
                          int64_t bits, std::optional<int64_t> act_bits) {
  Weight w("x", x, packed, scale, zero_point, offsets, grid, code_min, bits, x.size(-1));
  const Tensor bias = add_operands(w.call, x, bias_, act_bits);
  return bits < 8 && cuda::lowbit_gemv_serves(w.call);
}

void lowbit_linear_cuda(const Tensor& x, const Tensor& packed, const Tensor& scale, const OptionalTensor& zero_point,
                        const OptionalTensor& bias_, const OptionalTensor& offsets, Constants grid, int64_t code_min,
                        int64_t bits, std::optional<int64_t> act_bits, const Tensor& out) {
  Weight w("x", x, packed, scale, zero_point, offsets, grid, code_min, bits, x.size(-1));
  const Tensor bias = add_operands(w.call, x, bias_, act_bits);
  w.call.y = out.mutable_data_ptr();
  if (out.numel() == 0) return;
  TORCH_CHECK(cuda::lowbit_gemv_serves(w.call),
              "the CUDA kernel takes at most 8 tokens of one expert, and no torch.float64; x is ",
              name_of(x.scalar_type()), " of shape ", shape_string(x.sizes()), offsets ? " with offsets" : "");
  launch_on(x.device(), [&](cudaStream_t stream) {
    size_t bytes = 0;
    const cudaError_t error = cuda::lowbit_gemv_workspace(w.call, &bytes);
    if (error != cudaSuccess) return error;
    return cuda::lowbit_gemv(w.call, workspace(bytes, x.device()).mutable_data_ptr(), stream);
  });
}
#endif

void lowbit_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const OptionalTensor& zero_point,
                   const OptionalTensor& bias_, const OptionalTensor& offsets, Constants grid, int64_t code_min,
                   int64_t bits, std::optional<int64_t> act_bits, const Tensor& out) {
  const int64_t cols = x.size(-1);
  Weight w("x", x, packed, scale, zero_point, offsets, grid, code_min, bits, cols);
  LowbitLinearCall& call = w.call;
  const Tensor bias = add_operands(call, x, bias_, act_bits);
  call.y = out.mutable_data_ptr();
  const Tensor y = out.view({call.tokens, call.rows});
  w.clear_rest(y);
  if (out.numel() == 0) return;
  if (call.x_type == DType::f64) {
    Tensor from = x;
    if (act_bits) fake_quantize_dynamic(x, *act_bits, from = like(x));
    multiply_dequantized(w, from.view({call.tokens, cols}), y, true, bias);
    return;
  }
  const LowbitPlan plan = cpu::lowbit_plan(call);
  const Tensor memory = allocate({plan.buffer_bytes + 64}, at::kByte, x.device());
  void* const at =
      reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.mutable_data_ptr()) + 63) & ~uintptr_t{63});
  const int64_t step = plan.token_step;
  at::parallel_for(0, (call.tokens + step - 1) / step, grain_of_rows(cols * step), [&](int64_t begin, int64_t end) {
    cpu::lowbit_prepare(plan, at, begin * step, std::min(end * step, call.tokens));
  });
  const auto multiply = [&](int64_t begin, int64_t end) {
    cpu::lowbit_multiply(plan, at, w.experts.data(), begin, end);
  };
  const int64_t panels = static_cast<int64_t>(w.experts.size()) * ((call.rows + kPanel - 1) / kPanel);
  if (offsets)
    parallel_dynamic(panels, multiply);
  else
    at::parallel_for(0, panels, 1, multiply);
}
void lowbit_linear_transposed(const Tensor& g, const Tensor& packed, const Tensor& scale,
                              const OptionalTensor& zero_point, const OptionalTensor& offsets, Constants grid,
                              int64_t code_min, int64_t bits, int64_t cols, const Tensor& out) {
  const Weight w("g", g, packed, scale, zero_point, offsets, grid, code_min, bits, cols);
  const Tensor to = out.view({w.call.tokens, cols}), from = g.view({w.call.tokens, w.call.rows});
  w.clear_rest(to);
  if (out.numel() == 0) return;
  multiply_dequantized(w, from, to, false, Tensor());
}

QK_CPU_KERNEL(lowbit_linear);
QK_CPU_KERNEL(lowbit_linear_transposed);
#if defined(QK_WITH_CUDA)
QK_CUDA_KERNEL(lowbit_linear_serves, lowbit_linear_serves);
QK_CUDA_KERNEL(lowbit_linear, lowbit_linear_cuda);
#endif

}  // namespace
}  // namespace qk
