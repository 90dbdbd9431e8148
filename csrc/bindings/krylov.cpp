// Gram-Schmidt on flat vectors: shapes are the business of the fake rule in qatkernels/ops/krylov.py; what is checked
// here is what memory safety needs.
#include <vector>

#include "../cpu/kernels.h"
#include "run.h"
#include "tensors.h"

namespace qk {
static int64_t size_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

static void run_on_cpu(const GramSchmidtCall& call) {
  const KrylovUnits units(call.rows, call.cols, size_of(call.basis_type));
  std::vector<double> partial(units.count() * (call.rows + 1));
  parallel(units.count(),
           [&](int64_t begin, int64_t end) { kernels().gram_schmidt(call, partial.data(), begin, end); });
  for (int64_t row = 0; row <= call.rows; ++row) {
    double total = 0;
    for (int64_t unit = 0; unit < units.count(); ++unit) total += partial[unit * (call.rows + 1) + row];
    (row < call.rows ? call.dots[row] : *call.sq) = total;
  }
}

namespace {

void gram_schmidt_out(const Tensor& basis_, const Tensor& w_, const OptionalTensor& h_, Tensor w_new, Tensor dots,
                      Tensor sq) {
  TORCH_CHECK(basis_.dim() == 2 && w_.dim() == 1 && basis_.size(1) == w_.numel(), "basis has shape ", basis_.sizes(),
              ", must be [m, ", w_.numel(), "] for w of shape ", w_.sizes());
  check_device("basis", basis_, w_.device());
  const Tensor basis = basis_.contiguous(), w = w_.contiguous();
  const DType basis_type = dtype_of("basis", basis), w_type = dtype_of("w", w);
  TORCH_CHECK(basis_type != DType::f16, "basis is torch.float16, must be torch.float32, torch.bfloat16 or float64");
  TORCH_CHECK(w_type == DType::f32 || w_type == DType::f64, "w is ", name_of(w.scalar_type()),
              ", must be torch.float32 or torch.float64");
  check_output("w_new", w_new, w, w.scalar_type());
  TORCH_CHECK(dots.is_contiguous() && dots.scalar_type() == at::kDouble && dots.dim() == 1 &&
                  dots.numel() == basis.size(0) && dots.device() == w.device(),
              "dots must be contiguous, torch.float64, one for each row of basis");
  TORCH_CHECK(sq.scalar_type() == at::kDouble && sq.numel() == 1 && sq.device() == w.device(),
              "sq must be torch.float64 with one element");
  Tensor h;
  if (h_) {
    TORCH_CHECK(h_->dim() == 1 && h_->numel() == basis.size(0), "h has shape ", h_->sizes(), ", must be [",
                basis.size(0), "], one for each row of basis");
    check_device("h", *h_, w.device());
    TORCH_CHECK(at::isFloatingType(h_->scalar_type()), "h is ", name_of(h_->scalar_type()), ", must be real numbers");
    h = h_->to(at::kDouble).contiguous();
  }
  const GramSchmidtCall call{basis.const_data_ptr(),
                             w.const_data_ptr(),
                             h_ ? h.const_data_ptr<double>() : nullptr,
                             w_new.mutable_data_ptr(),
                             dots.mutable_data_ptr<double>(),
                             sq.mutable_data_ptr<double>(),
                             basis.size(0),
                             basis.size(1),
                             basis_type,
                             w_type};
  run_here(call, w.device());
}
std::tuple<Tensor, Tensor, Tensor> gram_schmidt(const Tensor& basis, const Tensor& w, const OptionalTensor& h) {
  TORCH_CHECK(basis.dim() == 2, "basis has shape ", basis.sizes(), ", must be [m, n]");
  Tensor w_new = like(w), dots = allocate({basis.size(0)}, at::kDouble, w.device()),
         sq = allocate({}, at::kDouble, w.device());
  gram_schmidt_out(basis, w, h, w_new, dots, sq);
  return {w_new, dots, sq};
}

}  // namespace

void add_krylov(Ops& ops) {
  QK_CPU_OP(ops, gram_schmidt);
  QK_CPU_OP(ops, gram_schmidt_out);
}

}  // namespace qk
