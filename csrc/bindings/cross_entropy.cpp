// Softmax cross-entropy of rows.
#include "../cpu/cross_entropy.h"

#include "registry.h"
#include "tensors.h"

namespace qk {
namespace {

CrossEntropyCall call_of(const Tensor& logits, const Tensor& targets, int64_t ignore_index) {
  CrossEntropyCall call{};
  call.logits = logits.const_data_ptr();
  call.targets = targets.const_data_ptr<int64_t>();
  call.rows = logits.size(0);
  call.cols = logits.size(1);
  call.ignore_index = ignore_index;
  call.type = dtype_of(logits);
  return call;
}

void run(const CrossEntropyCall& call, const decltype(cpu::cross_entropy)& kernel) {
  at::parallel_for(0, call.rows, grain_of_rows(call.cols),
                   [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

void cross_entropy(const Tensor& logits, const Tensor& targets, int64_t ignore_index, const Tensor& loss,
                   const Tensor& lse) {
  CrossEntropyCall call = call_of(logits, targets, ignore_index);
  call.loss = loss.mutable_data_ptr();
  call.lse_out = lse.mutable_data_ptr();
  run(call, cpu::cross_entropy);
}

void cross_entropy_jvp(const Tensor& tangent, const Tensor& logits, const Tensor& lse, const Tensor& targets,
                       int64_t ignore_index, const Tensor& tangent_loss) {
  CrossEntropyCall call = call_of(logits, targets, ignore_index);
  call.tangent = tangent.const_data_ptr();
  call.lse = lse.const_data_ptr();
  call.tangent_loss = tangent_loss.mutable_data_ptr();
  run(call, cpu::cross_entropy_hvp);
}

void cross_entropy_backward(const Tensor& g, const Tensor& logits, const Tensor& lse, const Tensor& targets,
                            int64_t ignore_index, const Tensor& grad) {
  CrossEntropyCall call = call_of(logits, targets, ignore_index);
  call.g = g.const_data_ptr();
  call.lse = lse.const_data_ptr();
  call.grad = grad.mutable_data_ptr();
  run(call, cpu::cross_entropy_backward);
}

// The gradient is written only where `grad` is given.
void second_order(const Tensor& tangent, const OptionalTensor& tangent_g, const Tensor& g, const Tensor& logits,
                  const Tensor& lse, const Tensor& targets, int64_t ignore_index, void* grad,
                  const Tensor& tangent_grad, const Tensor& tangent_loss) {
  CrossEntropyCall call = call_of(logits, targets, ignore_index);
  call.tangent = tangent.const_data_ptr();
  call.g = g.const_data_ptr();
  call.tangent_g = tangent_g ? tangent_g->const_data_ptr() : nullptr;
  call.lse = lse.const_data_ptr();
  call.grad = grad;
  call.tangent_grad = tangent_grad.mutable_data_ptr();
  call.tangent_loss = tangent_loss.mutable_data_ptr();
  run(call, cpu::cross_entropy_hvp);
}

void cross_entropy_hvp(const Tensor& tangent, const OptionalTensor& tangent_g, const Tensor& g, const Tensor& logits,
                       const Tensor& lse, const Tensor& targets, int64_t ignore_index, const Tensor& tangent_grad,
                       const Tensor& tangent_loss) {
  second_order(tangent, tangent_g, g, logits, lse, targets, ignore_index, nullptr, tangent_grad, tangent_loss);
}

void cross_entropy_dual(const Tensor& tangent, const OptionalTensor& tangent_g, const Tensor& g, const Tensor& logits,
                        const Tensor& lse, const Tensor& targets, int64_t ignore_index, const Tensor& grad,
                        const Tensor& tangent_grad, const Tensor& tangent_loss) {
  second_order(tangent, tangent_g, g, logits, lse, targets, ignore_index, grad.mutable_data_ptr(), tangent_grad,
               tangent_loss);
}

QK_CPU_KERNEL(cross_entropy);
QK_CPU_KERNEL(cross_entropy_jvp);
QK_CPU_KERNEL(cross_entropy_backward);
QK_CPU_KERNEL(cross_entropy_hvp);
QK_CPU_KERNEL(cross_entropy_dual);

}  // namespace
}  // namespace qk
