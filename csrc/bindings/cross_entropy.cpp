// Softmax cross-entropy of rows: shapes and dtypes are the business of the fake rules in
// qatkernels/ops/cross_entropy.py; what is checked here is what memory safety needs.
#include "../cpu/kernels.h"
#include "run.h"
#include "tensors.h"

namespace qk {
namespace {

using Kernel = void (*)(const CrossEntropyCall&, int64_t, int64_t);

at::ScalarType number_type(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A call and the contiguous tensors it points into.
struct Rows {
  CrossEntropyCall call{};
  Tensor logits, targets, tangent;
  std::vector<Tensor> kept;

  Rows(const Tensor& logits_, const Tensor& targets_, int64_t ignore_index)
      : logits(logits_.contiguous()), targets(targets_.contiguous()) {
    TORCH_CHECK(logits.dim() == 2, "logits has shape ", logits.sizes(), ", must be [tokens, vocabulary]");
    TORCH_CHECK(logits.size(1) > 0, "logits has no columns, must have a vocabulary");
    TORCH_CHECK(logits.device().is_cpu(), "no C++ kernel for ", logits.device());
    TORCH_CHECK(targets.scalar_type() == at::kLong && targets.dim() == 1 && targets.numel() == logits.size(0),
                "targets is ", name_of(targets.scalar_type()), " of shape ", targets.sizes(), ", must be torch.int64 [",
                logits.size(0), "]");
    check_device("targets", targets, logits.device());
    call.type = dtype_of("logits", logits);
    call.logits = logits.const_data_ptr();
    call.targets = targets.const_data_ptr<int64_t>();
    call.rows = logits.size(0);
    call.cols = logits.size(1);
    call.ignore_index = ignore_index;
  }

  const void* per_row(const char* name, const Tensor& t) {
    TORCH_CHECK(t.dim() == 1 && t.numel() == call.rows && t.scalar_type() == number_type(logits), name, " is ",
                name_of(t.scalar_type()), " of shape ", t.sizes(), ", must be ", name_of(number_type(logits)), " [",
                call.rows, "]");
    check_device(name, t, logits.device());
    kept.push_back(t.contiguous());
    return kept.back().const_data_ptr();
  }
  void* per_row_out(const char* name, Tensor& t) {
    TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
    per_row(name, t);
    return t.mutable_data_ptr();
  }
  void along(const Tensor& t) {
    TORCH_CHECK(t.sizes() == logits.sizes() && t.scalar_type() == logits.scalar_type(),
                "tangent must have the shape and dtype of logits");
    check_device("tangent", t, logits.device());
    tangent = t.contiguous();
    call.tangent = tangent.const_data_ptr();
  }
  void* full_out(const char* name, Tensor& t) {
    check_output(name, t, logits, logits.scalar_type());
    return t.mutable_data_ptr();
  }
  void run(Kernel kernel) const {
    const int64_t grain = std::max<int64_t>(1, kUnitElements / std::max<int64_t>(call.cols, 1));
    parallel(call.rows, [&](int64_t begin, int64_t end) { kernel(call, begin, end); }, grain);
  }
};

Tensor numbers_for(const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 2, "logits has shape ", logits.sizes(), ", must be [tokens, vocabulary]");
  return allocate({logits.size(0)}, number_type(logits), logits.device());
}

void cross_entropy_out(const Tensor& logits, const Tensor& targets, int64_t ignore_index, Tensor loss, Tensor lse) {
  Rows rows(logits, targets, ignore_index);
  rows.call.loss = rows.per_row_out("loss", loss);
  rows.call.lse_out = rows.per_row_out("lse", lse);
  rows.run(kernels().cross_entropy);
}
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& targets, int64_t ignore_index) {
  Tensor loss = numbers_for(logits), lse = numbers_for(logits);
  cross_entropy_out(logits, targets, ignore_index, loss, lse);
  return {loss, lse};
}

void cross_entropy_jvp_out(const Tensor& tangent, const Tensor& logits, const Tensor& lse, const Tensor& targets,
                           int64_t ignore_index, Tensor tangent_loss) {
  Rows rows(logits, targets, ignore_index);
  rows.along(tangent);
  rows.call.lse = rows.per_row("lse", lse);
  rows.call.tangent_loss = rows.per_row_out("tangent_loss", tangent_loss);
  rows.run(kernels().cross_entropy_hvp);
}
Tensor cross_entropy_jvp(const Tensor& tangent, const Tensor& logits, const Tensor& lse, const Tensor& targets,
                         int64_t ignore_index) {
  Tensor tangent_loss = numbers_for(logits);
  cross_entropy_jvp_out(tangent, logits, lse, targets, ignore_index, tangent_loss);
  return tangent_loss;
}

void cross_entropy_backward_out(const Tensor& g, const Tensor& logits, const Tensor& lse, const Tensor& targets,
                                int64_t ignore_index, Tensor grad) {
  Rows rows(logits, targets, ignore_index);
  rows.call.g = rows.per_row("g", g);
  rows.call.lse = rows.per_row("lse", lse);
  rows.call.grad = rows.full_out("grad", grad);
  rows.run(kernels().cross_entropy_backward);
}
Tensor cross_entropy_backward(const Tensor& g, const Tensor& logits, const Tensor& lse, const Tensor& targets,
                              int64_t ignore_index) {
  Tensor grad = like(logits);
  cross_entropy_backward_out(g, logits, lse, targets, ignore_index, grad);
  return grad;
}

// grad may be undefined: it is written only where it is wanted.
void second_order(const Tensor& tangent, const OptionalTensor& tangent_g, const Tensor& g, const Tensor& logits,
                  const Tensor& lse, const Tensor& targets, int64_t ignore_index, Tensor grad, Tensor& tangent_grad,
                  Tensor& tangent_loss) {
  Rows rows(logits, targets, ignore_index);
  rows.along(tangent);
  rows.call.g = rows.per_row("g", g);
  if (tangent_g) rows.call.tangent_g = rows.per_row("tangent_g", *tangent_g);
  rows.call.lse = rows.per_row("lse", lse);
  if (grad.defined()) rows.call.grad = rows.full_out("grad", grad);
  rows.call.tangent_grad = rows.full_out("tangent_grad", tangent_grad);
  rows.call.tangent_loss = rows.per_row_out("tangent_loss", tangent_loss);
  rows.run(kernels().cross_entropy_hvp);
}

void cross_entropy_hvp_out(const Tensor& tangent, const OptionalTensor& tangent_g, const Tensor& g,
                           const Tensor& logits, const Tensor& lse, const Tensor& targets, int64_t ignore_index,
                           Tensor tangent_grad, Tensor tangent_loss) {
  second_order(tangent, tangent_g, g, logits, lse, targets, ignore_index, Tensor(), tangent_grad, tangent_loss);
}
std::tuple<Tensor, Tensor> cross_entropy_hvp(const Tensor& tangent, const OptionalTensor& tangent_g, const Tensor& g,
                                             const Tensor& logits, const Tensor& lse, const Tensor& targets,
                                             int64_t ignore_index) {
  Tensor tangent_grad = like(logits), tangent_loss = numbers_for(logits);
  cross_entropy_hvp_out(tangent, tangent_g, g, logits, lse, targets, ignore_index, tangent_grad, tangent_loss);
  return {tangent_grad, tangent_loss};
}

void cross_entropy_dual_out(const Tensor& tangent, const OptionalTensor& tangent_g, const Tensor& g,
                            const Tensor& logits, const Tensor& lse, const Tensor& targets, int64_t ignore_index,
                            Tensor grad, Tensor tangent_grad, Tensor tangent_loss) {
  second_order(tangent, tangent_g, g, logits, lse, targets, ignore_index, grad, tangent_grad, tangent_loss);
}
std::tuple<Tensor, Tensor, Tensor> cross_entropy_dual(const Tensor& tangent, const OptionalTensor& tangent_g,
                                                      const Tensor& g, const Tensor& logits, const Tensor& lse,
                                                      const Tensor& targets, int64_t ignore_index) {
  Tensor grad = like(logits), tangent_grad = like(logits), tangent_loss = numbers_for(logits);
  cross_entropy_dual_out(tangent, tangent_g, g, logits, lse, targets, ignore_index, grad, tangent_grad, tangent_loss);
  return {grad, tangent_grad, tangent_loss};
}

}  // namespace

void add_cross_entropy(Ops& ops) {
  QK_CPU_OP(ops, cross_entropy);
  QK_CPU_OP(ops, cross_entropy_out);
  QK_CPU_OP(ops, cross_entropy_jvp);
  QK_CPU_OP(ops, cross_entropy_jvp_out);
  QK_CPU_OP(ops, cross_entropy_backward);
  QK_CPU_OP(ops, cross_entropy_backward_out);
  QK_CPU_OP(ops, cross_entropy_hvp);
  QK_CPU_OP(ops, cross_entropy_hvp_out);
  QK_CPU_OP(ops, cross_entropy_dual);
  QK_CPU_OP(ops, cross_entropy_dual_out);
}

}  // namespace qk
