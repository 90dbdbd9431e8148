// Products of tokens with the weights of their experts: the library's, for one expert after another.
#include <ATen/ops/mm.h>

#include "tensors.h"

namespace qk {
namespace {

void check(const char* first, const Tensor& a, const char* second, const Tensor& b, int64_t dims,
           const Tensor& offsets) {
  dtype_of(first, a);
  TORCH_CHECK(b.scalar_type() == a.scalar_type(), second, " is ", name_of(b.scalar_type()), ", must be ",
              name_of(a.scalar_type()), " like ", first);
  TORCH_CHECK(a.dim() == 2, first, " has shape ", shown(a), ", must have 2 dimensions");
  TORCH_CHECK(b.dim() == dims, second, " has shape ", shown(b), ", must have ", dims, " dimensions");
  check_offsets(offsets, dims == 3 ? b.size(0) : offsets.numel());
  TORCH_CHECK(a.is_cpu(), first, " is on ", a.device(), ", must be on a CPU");
  for (const auto& [name, t] : {std::pair(second, &b), std::pair("offsets", &offsets)})
    TORCH_CHECK(t->device() == a.device(), name, " is on ", t->device(), ", must be on ", a.device(), " like ", first);
}
void check_columns(const char* name, const Tensor& t, int64_t columns, const char* like) {
  TORCH_CHECK(t.size(1) == columns, name, " has ", t.size(1), " columns, must be ", columns, " like ", like);
}
void check_out(const Tensor& out, at::IntArrayRef sizes, const Tensor& like) {
  TORCH_CHECK_VALUE(out.sizes() == sizes && out.scalar_type() == like.scalar_type() && out.device() == like.device() &&
                        out.is_contiguous(),
                    "out is ", name_of(out.scalar_type()), " of shape ", shown(out), ", must be contiguous ",
                    name_of(like.scalar_type()), " of shape ", shown(sizes), " on ", like.device());
}

// The rows of each expert times its matrix of [E, K, N].
void multiply_rows(const char* name, const Tensor& x, const Tensor& w, const Tensor& offsets, const Tensor& y) {
  int64_t written = 0;
  for (const Expert& e : experts_of(offsets, x.size(0), name)) {
    Tensor to = y.narrow(0, e.first, e.last - e.first);
    at::mm_out(to, x.narrow(0, e.first, e.last - e.first), w.select(0, e.index));
    written = e.last;
  }
  y.narrow(0, written, y.size(0) - written).zero_();  // nobody's rows
}

void grouped_linear_out(const Tensor& x, const Tensor& w, const Tensor& offsets, Tensor out) {
  check("x", x, "w", w, 3, offsets);
  check_columns("x", x, w.size(2), "w");
  check_out(out, {x.size(0), w.size(1)}, x);
  multiply_rows("x", x, w.mT(), offsets, out);
}
Tensor grouped_linear(const Tensor& x, const Tensor& w, const Tensor& offsets) {
  check("x", x, "w", w, 3, offsets);
  Tensor out = allocate({x.size(0), w.size(1)}, x.scalar_type(), x.device());
  grouped_linear_out(x, w, offsets, out);
  return out;
}

void grouped_linear_transposed_out(const Tensor& g, const Tensor& w, const Tensor& offsets, Tensor out) {
  check("g", g, "w", w, 3, offsets);
  check_columns("g", g, w.size(1), "w's rows");
  check_out(out, {g.size(0), w.size(2)}, g);
  multiply_rows("g", g, w, offsets, out);
}
Tensor grouped_linear_transposed(const Tensor& g, const Tensor& w, const Tensor& offsets) {
  check("g", g, "w", w, 3, offsets);
  Tensor out = allocate({g.size(0), w.size(2)}, g.scalar_type(), g.device());
  grouped_linear_transposed_out(g, w, offsets, out);
  return out;
}

void grouped_outer_out(const Tensor& g, const Tensor& x, const Tensor& offsets, Tensor out) {
  check("g", g, "x", x, 2, offsets);
  TORCH_CHECK(g.size(0) == x.size(0), "g has ", g.size(0), " rows, must be ", x.size(0), " like x");
  check_out(out, {offsets.size(0), g.size(1), x.size(1)}, x);
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
Tensor grouped_outer(const Tensor& g, const Tensor& x, const Tensor& offsets) {
  check("g", g, "x", x, 2, offsets);
  Tensor out = allocate({offsets.size(0), g.size(1), x.size(1)}, x.scalar_type(), x.device());
  grouped_outer_out(g, x, offsets, out);
  return out;
}

}  // namespace

void add_grouped(Ops& ops) {
  QK_CPU_OP(ops, grouped_linear);
  QK_CPU_OP(ops, grouped_linear_out);
  QK_CPU_OP(ops, grouped_linear_transposed);
  QK_CPU_OP(ops, grouped_linear_transposed_out);
  QK_CPU_OP(ops, grouped_outer);
  QK_CPU_OP(ops, grouped_outer_out);
}

}  // namespace qk
