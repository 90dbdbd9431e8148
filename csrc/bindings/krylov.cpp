// Gram-Schmidt on flat vectors.
#include <vector>

#include "../cpu/kernels.h"
#include "registry.h"
#include "tensors.h"

namespace qk {
static int64_t size_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

static void run(const GramSchmidtCall& call) {
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

void gram_schmidt(const Tensor& basis, const Tensor& w, const OptionalTensor& h, const Tensor& w_new,
                  const Tensor& dots, const Tensor& sq) {
  const Tensor coefficients = h ? h->to(at::kDouble) : Tensor();
  run(GramSchmidtCall{basis.const_data_ptr(), w.const_data_ptr(), h ? coefficients.const_data_ptr<double>() : nullptr,
                      w_new.mutable_data_ptr(), dots.mutable_data_ptr<double>(), sq.mutable_data_ptr<double>(),
                      basis.size(0), basis.size(1), dtype_of(basis), dtype_of(w)});
}

QK_CPU_KERNEL(gram_schmidt);

}  // namespace
}  // namespace qk
