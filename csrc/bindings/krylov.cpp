// Gram-Schmidt on flat vectors.
#include "../cpu/krylov.h"

#include <vector>

#include "registry.h"
#include "tensors.h"

namespace qk {
namespace {

void gram_schmidt(const Tensor& basis, const Tensor& w, const OptionalTensor& h, const Tensor& w_new,
                  const Tensor& dots, const Tensor& sq) {
  const Tensor coefficients = h ? h->to(at::kDouble) : Tensor();
  const GramSchmidtCall call{basis.const_data_ptr(),
                             w.const_data_ptr(),
                             h ? coefficients.const_data_ptr<double>() : nullptr,
                             w_new.mutable_data_ptr(),
                             dots.mutable_data_ptr<double>(),
                             sq.mutable_data_ptr<double>(),
                             basis.size(0),
                             basis.size(1),
                             dtype_of(basis),
                             dtype_of(w)};
  const int64_t units = KrylovUnits(call.rows, call.cols, basis.element_size()).count();
  std::vector<double> partial(units * (call.rows + 1));
  at::parallel_for(0, units, 1,
                   [&](int64_t begin, int64_t end) { cpu::gram_schmidt(call, partial.data(), begin, end); });
  for (int64_t row = 0; row <= call.rows; ++row) {
    double total = 0;
    for (int64_t unit = 0; unit < units; ++unit) total += partial[unit * (call.rows + 1) + row];
    (row < call.rows ? call.dots[row] : *call.sq) = total;
  }
}

QK_CPU_KERNEL(gram_schmidt);

}  // namespace
}  // namespace qk
