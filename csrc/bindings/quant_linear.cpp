// A quantized linear layer and its tangent: blocks of rows of the weight and of its tangent are read once, quantized
// into memory that stays in the caches, and multiplied from there.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <numeric>

#include "../cpu/fake_quantize.h"
#include "quant_args.h"
#include "registry.h"
#include "tensors.h"

namespace qk {
namespace {

// Bytes of a block: of the quantized weight and its tangent. Smaller blocks are not faster: their products have few
// columns, and all threads wait for each other more often.
constexpr int64_t kBlockBytes = 32 << 20;

// How many rows of the weight [rows, cols] a block has: about kBlockBytes of them, and whole units of the kernel.
int64_t rows_of_block(const QuantArgs& args, int64_t rows, int64_t cols, int64_t element_bytes) {
  const Units units(args.rows, args.cols);
  const bool cut = units.pieces_per_row > 1;
  if (cut && args.rows > 1 && args.cols % kUnitElements != 0) return rows;  // units of several sizes
  const int64_t unit = cut ? kUnitElements : units.rows_per_unit * args.cols;
  const int64_t step = unit / std::gcd(unit, cols);
  const int64_t wanted = kBlockBytes / (2 * cols * element_bytes);
  return std::min(rows, std::max<int64_t>(1, wanted / step) * step);
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
  const int64_t block = transposed || w.numel() == 0 ? rows : rows_of_block(args, rows, cols, element);
  const Tensor value = allocate({block, cols}, x.scalar_type(), w.device()), slope = moves ? like(value) : Tensor();
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t count = std::min(block, rows - first);
    // All units but the last have one size, unless all rows are one block.
    const int64_t unit = units.pieces_per_row > 1 ? kUnitElements : units.rows_per_unit * units.cols;
    const int64_t begin = unit ? first * cols / unit : 0;
    const int64_t end = first + count == rows ? units.count() : (first + count) * cols / unit;
    // The kernels index elements from the first of the whole weight, so the pointers are shifted back.
    const auto origin = [&](const Tensor& t) {
      return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) - first * cols * element);
    };
    const FakeQuantizeJvpCall jvp{args,
                                  pointer_or_null(tangent_w),
                                  pointer_or_null(tangent_scale),
                                  pointer_or_null(tangent_zero_point),
                                  moves ? origin(slope) : nullptr,
                                  dtype_of(x),
                                  origin(value)};
    const FakeQuantizeCall forward{args, origin(value), dtype_of(x)};
    at::parallel_for(0, end - begin, 1, [&](int64_t from, int64_t to) {
      moves ? cpu::fake_quantize_jvp(jvp, begin + from, begin + to)
            : cpu::fake_quantize(forward, begin + from, begin + to);
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
QK_CPU_KERNEL(quant_linear_dual);

}  // namespace
}  // namespace qk
