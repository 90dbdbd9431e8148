// Products of tokens with the weights of their experts, one at::mm for each expert.
#include <ATen/ops/mm.h>

#include "registry.h"
#include "tensors.h"

namespace qk {
namespace {

// Multiplies the rows of x that belong to each expert with its matrix of [E, K, N].
void multiply_rows(const char* name, const Tensor& x, const Tensor& w, const Tensor& offsets, const Tensor& y) {
  int64_t written = 0;
  for (const Expert& e : experts_of(offsets, x.size(0), name)) {
    Tensor to = y.narrow(0, e.first, e.last - e.first);
    at::mm_out(to, x.narrow(0, e.first, e.last - e.first), w.select(0, e.index));
    written = e.last;
  }
  y.narrow(0, written, y.size(0) - written).zero_();  // unassigned rows
}

void grouped_linear(const Tensor& x, const Tensor& w, const Tensor& offsets, const Tensor& out) {
  multiply_rows("x", x, w.mT(), offsets, out);
}

void grouped_linear_transposed(const Tensor& g, const Tensor& w, const Tensor& offsets, const Tensor& out) {
  multiply_rows("g", g, w, offsets, out);
}

void grouped_outer(const Tensor& g, const Tensor& x, const Tensor& offsets, const Tensor& out) {
  int64_t written = 0;
  const auto clear_until = [&](int64_t expert) { out.narrow(0, written, expert - written).zero_(); };
  for (const Expert& e : experts_of(offsets, x.size(0), "x")) {
    if (written < e.index) clear_until(e.index);
    Tensor to = out.select(0, e.index);
    at::mm_out(to, g.narrow(0, e.first, e.last - e.first).t(), x.narrow(0, e.first, e.last - e.first));
    written = e.index + 1;
  }
  clear_until(offsets.size(0));
}

QK_CPU_KERNEL(grouped_linear);
QK_CPU_KERNEL(grouped_linear_transposed);
QK_CPU_KERNEL(grouped_outer);

}  // namespace
}  // namespace qk
