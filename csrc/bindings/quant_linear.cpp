// A quantized linear layer and its tangent: blocks of rows of the weight and of its tangent are read once, quantized
// into memory that stays in the caches, and multiplied from there.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <numeric>

#include "../cpu/kernels.h"
#include "quant_args.h"
#include "tensors.h"

namespace qk {
namespace {

// Of quantized weight and tangent. Smaller ones gain nothing: products of few columns, and more often all threads wait.
constexpr int64_t kBlockBytes = 32 << 20;

// Rows of the weight [rows, cols] that begin and end with units of the kernel and are about as many as a block holds.
int64_t rows_of_block(const QuantArgs& args, int64_t rows, int64_t cols, int64_t element_bytes) {
  const Units units(args.rows, args.cols);
  const bool cut = units.pieces_per_row > 1;
  if (cut && args.rows > 1 && args.cols % kUnitElements != 0) return rows;  // units of several sizes
  const int64_t unit = cut ? kUnitElements : units.rows_per_unit * args.cols;
  const int64_t step = unit / std::gcd(unit, cols);
  const int64_t wanted = kBlockBytes / (2 * cols * element_bytes);
  return std::min(rows, std::max<int64_t>(1, wanted / step) * step);
}

void quant_linear_dual_out(const Tensor& x, const OptionalTensor& tangent_x, const OptionalTensor& tangent_w,
                           const OptionalTensor& tangent_scale, const OptionalTensor& tangent_zero_point,
                           const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point,
                           const OptionalTensor& seed, Constants grid, double noise_std, double scale_noise_std,
                           double grad_scale, bool transposed, Tensor y, Tensor tangent) {
  TORCH_CHECK(w.dim() == 2 && x.dim() == 2 && x.size(1) == w.size(transposed ? 0 : 1), "x has shape ", x.sizes(),
              ", must be [tokens, ", transposed ? "outputs" : "inputs", "] for w of shape ", w.sizes());
  TORCH_CHECK(w.device().is_cpu(), "no C++ kernel for ", w.device());
  check_device("x", x, w.device());
  dtype_of("w", w);
  TORCH_CHECK(x.scalar_type() == w.scalar_type() ||
                  (w.scalar_type() == at::kFloat && (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf)),
              "x is ", name_of(x.scalar_type()), ", must be w's ", name_of(w.scalar_type()),
              ", or a 16-bit float for a float32 w");
  TORCH_CHECK(!tangent_x || (tangent_x->sizes() == x.sizes() && tangent_x->scalar_type() == x.scalar_type()),
              "tangent_x must have the shape and dtype of x");
  const int64_t sizes[] = {x.size(0), w.size(transposed ? 1 : 0)};
  for (const auto& [name, t] : {std::pair("out", &y), std::pair("tangent", &tangent)})
    TORCH_CHECK(t->is_contiguous() && t->sizes() == at::IntArrayRef(sizes) && t->scalar_type() == x.scalar_type() &&
                    t->device() == x.device(),
                name, " is ", name_of(t->scalar_type()), " of shape ", shown(*t), " on ", t->device(),
                ", must be contiguous ", name_of(x.scalar_type()), " of shape ", shown(sizes), " on ", x.device());
  const Held held(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale);
  const Tangents along(tangent_w, tangent_scale, tangent_zero_point, held);
  const bool moves = tangent_w || tangent_scale || tangent_zero_point;
  const int64_t rows = w.size(0), cols = w.size(1), element = c10::elementSize(x.scalar_type());
  const Units units(held.args.rows, held.args.cols);
  // The blocks' parts of a transposed product would have to be added, in 16 bits rounded each time.
  const int64_t block = transposed || w.numel() == 0 ? rows : rows_of_block(held.args, rows, cols, element);
  const Tensor value = allocate({block, cols}, x.scalar_type(), w.device()), slope = moves ? like(value) : Tensor();
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t count = std::min(block, rows - first);
    // Units are of one size up to the last, unless all rows are one block.
    const int64_t unit = units.pieces_per_row > 1 ? kUnitElements : units.rows_per_unit * units.cols;
    const int64_t begin = unit ? first * cols / unit : 0;
    const int64_t end = first + count == rows ? units.count() : (first + count) * cols / unit;
    // The kernels count elements from the weight's first.
    const auto origin = [&](const Tensor& t) {
      return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) - first * cols * element);
    };
    const FakeQuantizeJvpCall jvp = along.call(moves ? origin(slope) : nullptr, dtype_of("x", x), origin(value));
    const FakeQuantizeCall forward{held.args, origin(value), dtype_of("x", x)};
    parallel(end - begin, [&](int64_t from, int64_t to) {
      moves ? kernels().jvp(jvp, begin + from, begin + to) : kernels().forward(forward, begin + from, begin + to);
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
std::tuple<Tensor, Tensor> quant_linear_dual(const Tensor& x, const OptionalTensor& tangent_x,
                                             const OptionalTensor& tangent_w, const OptionalTensor& tangent_scale,
                                             const OptionalTensor& tangent_zero_point, const Tensor& w,
                                             const Tensor& scale, const OptionalTensor& zero_point,
                                             const OptionalTensor& seed, Constants grid, double noise_std,
                                             double scale_noise_std, double grad_scale, bool transposed) {
  TORCH_CHECK(w.dim() == 2 && x.dim() == 2, "x and w must have two dimensions");
  Tensor y = allocate({x.size(0), w.size(transposed ? 1 : 0)}, x.scalar_type(), x.device()), tangent = like(y);
  quant_linear_dual_out(x, tangent_x, tangent_w, tangent_scale, tangent_zero_point, w, scale, zero_point, seed, grid,
                        noise_std, scale_noise_std, grad_scale, transposed, y, tangent);
  return {y, tangent};
}

}  // namespace

void add_quant_linear(Ops& ops) {
  QK_CPU_OP(ops, quant_linear_dual);
  QK_CPU_OP(ops, quant_linear_dual_out);
}

}  // namespace qk
