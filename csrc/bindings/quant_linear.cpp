// A quantized linear layer: its output together with the tangent, for which blocks of rows of the weight and of its
// tangent are read once, quantized into memory that stays in the caches, and multiplied from there; and the gradients
// of its weight.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <numeric>
#include <utility>
#include <vector>

#include "../cpu/fake_quantize.h"
#include "../cpu/outer_product.h"
#include "quant_args.h"
#include "registry.h"
#include "tensors.h"

namespace qk {
namespace {

// Bytes of a block: of the quantized weight and its tangent. Smaller blocks are not faster: their products have few
// columns, and all threads wait for each other more often.
constexpr int64_t kDualBytes = 32 << 20;

// How many rows of the weight [rows, cols] a block has: about so many elements, and whole units of the kernel.
int64_t rows_of_block(const QuantArgs& args, int64_t rows, int64_t cols, int64_t elements) {
  const Units units(args.rows, args.cols);
  const bool cut = units.pieces_per_row > 1;
  if (cut && args.rows > 1 && args.cols % kUnitElements != 0) return rows;  // units of several sizes
  const int64_t unit = cut ? kUnitElements : units.rows_per_unit * args.cols;
  const int64_t step = unit / std::gcd(unit, cols);
  const int64_t wanted = elements / cols;
  return std::min(rows, std::max<int64_t>(1, wanted / step) * step);
}

// The units of rows [first, first + count) of the weight, a block.
std::pair<int64_t, int64_t> units_of(const Units& units, int64_t rows, int64_t cols, int64_t first, int64_t count) {
  // All units but the last have one size, unless all rows are one block.
  const int64_t unit = units.pieces_per_row > 1 ? kUnitElements : units.rows_per_unit * units.cols;
  return {unit ? first * cols / unit : 0, first + count == rows ? units.count() : (first + count) * cols / unit};
}

// Kernels index elements from the first of the whole weight: where that would be, for a block from element `first` on.
void* origin_of(const Tensor& block, int64_t first) {
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(block.mutable_data_ptr()) - first * block.element_size());
}

void quant_linear_dual(const Tensor& x, const OptionalTensor& tangent_x, const OptionalTensor& tangent_w,
                       const OptionalTensor& tangent_scale, const OptionalTensor& tangent_zero_point, const Tensor& w,
                       const Tensor& scale, const OptionalTensor& zero_point, const OptionalTensor& seed,
                       Constants grid, double noise_std, double scale_noise_std, double grad_scale, bool transposed,
                       const Tensor& y, const Tensor& tangent) {
  const QuantArgs args = quant_args(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale);
  if (w.size(0) == 0) {  // no block would write a transposed product
    y.zero_();
    tangent.zero_();
    return;
  }
  const bool moves = tangent_w || tangent_scale || tangent_zero_point;
  const int64_t rows = w.size(0), cols = w.size(1), element = c10::elementSize(x.scalar_type());
  const Units units(args.rows, args.cols);
  // A transposed product is a single block: otherwise the products of its blocks would be added up, and each sum
  // rounded to 16 bits.
  const int64_t block =
      transposed || w.numel() == 0 ? rows : rows_of_block(args, rows, cols, kDualBytes / (2 * element));
  const Tensor value = allocate({block, cols}, x.scalar_type(), w.device()), slope = moves ? like(value) : Tensor();
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t count = std::min(block, rows - first);
    const auto [begin, end] = units_of(units, rows, cols, first, count);
    const auto origin = [&](const Tensor& t) { return origin_of(t, first * cols); };
    const FakeQuantizeJvpCall jvp{args,
                                  pointer_or_null(tangent_w),
                                  pointer_or_null(tangent_scale),
                                  pointer_or_null(tangent_zero_point),
                                  moves ? origin(slope) : nullptr,
                                  dtype_of(x),
                                  origin(value)};
    const FakeQuantizeCall forward{args, origin(value), dtype_of(x)};
    at::parallel_for(begin, end, 1, [&](int64_t from, int64_t to) {
      moves ? cpu::fake_quantize_jvp(jvp, from, to) : cpu::fake_quantize(forward, from, to);
    });
    const auto part = [&](const Tensor& t) { return transposed ? t : t.narrow(1, first, count); };
    const auto operand = [&](const Tensor& t) { return transposed ? t : t.narrow(0, 0, count).t(); };
    Tensor y_part = part(y), tangent_part = part(tangent);
    at::mm_out(y_part, x, operand(value));
    if (tangent_x) at::mm_out(tangent_part, *tangent_x, operand(value));
    if (moves && tangent_x) at::addmm_out(tangent_part, tangent_part, x, operand(slope));
    if (moves && !tangent_x) at::mm_out(tangent_part, x, operand(slope));
  }
  if (!moves && !tangent_x) tangent.zero_();
}

// The product and the backward of the quantization, part by part.
void backward_by_tiles(const OuterKernel& kernel, const OuterProduct& call) {
  const Tensor memory = allocate({kernel.buffer_bytes(call) + 64}, at::kByte, at::kCPU);
  char* const buffer =
      reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.mutable_data_ptr()) + 63) & ~uintptr_t{63});
  std::vector<double> partial(2 * call.rows * call.parts());
  at::parallel_for(0, (call.tokens + kOuterTokens - 1) / kOuterTokens, 1,
                   [&](int64_t begin, int64_t end) { kernel.prepare(call, buffer, begin, end); });
  at::parallel_for(0, call.units(), 1,
                   [&](int64_t begin, int64_t end) { kernel.multiply(call, buffer, partial.data(), begin, end); });
  kernel.finish(call, partial.data());
}

void quant_linear_backward(const Tensor& g, const Tensor& x, const Tensor& w, const Tensor& scale,
                           const OptionalTensor& zero_point, const OptionalTensor& seed, Constants grid,
                           double noise_std, double scale_noise_std, double grad_scale, const Tensor& dw,
                           const Tensor& ds, const Tensor& dz) {
  if (w.numel() == 0) {
    ds.zero_();
    dz.zero_();
    return;
  }
  FakeQuantizeBackwardCall call{quant_args(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale),
                                nullptr,
                                dtype_of(g),
                                dw.mutable_data_ptr(),
                                ds.mutable_data_ptr(),
                                zero_point ? dz.mutable_data_ptr() : nullptr};
  if (g.scalar_type() == at::kBFloat16) {
    const auto elements = [](const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); };
    const OuterProduct outer{call, elements(g), elements(x), g.size(0), w.size(0), w.size(1)};
    const OuterKernel* const kernel = outer.tokens > 0 ? cpu::outer_kernel(outer) : nullptr;
    if (kernel) return backward_by_tiles(*kernel, outer);
  }
  // In memory of the pool: with few tokens, page faults of fresh memory would take longer than the product.
  Tensor product = allocate(w.sizes(), g.scalar_type(), w.device());
  at::mm_out(product, g.t(), x);
  call.g = product.const_data_ptr();
  const Units units(call.args.rows, call.args.cols);
  std::vector<double> partial(units.pieces_per_row > 1 ? 2 * units.rows * units.pieces_per_row : 0);
  for_units(call.args,
            [&](int64_t begin, int64_t end) { cpu::fake_quantize_backward(call, partial.data(), begin, end); });
  cpu::finish_fake_quantize_backward(call, partial.data());
}

QK_CPU_KERNEL(quant_linear_dual);
QK_CPU_KERNEL(quant_linear_backward);

}  // namespace
}  // namespace qk
