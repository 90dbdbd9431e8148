// Products of two matrices: by torch, but of those that add over tokens some by tiles.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "../cpu/outer_product.h"
#include "registry.h"
#include "tensors.h"

namespace qk {
namespace {

// The fewest tokens for which tiles are faster than torch. On two cores with AMX, 1024 x 1024 to 4096 x 4096, the time
// over that of torch.mm was 1.0 to 1.1 at 512 tokens, 0.8 to 0.9 at 1024, 0.6 to 0.7 from 2048 on.
constexpr int64_t kFewestTokens = 768;

// out = left^T right.
void outer_product(const Tensor& left, const Tensor& right, const Tensor& out) {
  const OuterProduct call{static_cast<const uint16_t*>(left.const_data_ptr()),
                          static_cast<const uint16_t*>(right.const_data_ptr()),
                          static_cast<uint16_t*>(out.mutable_data_ptr()),
                          left.size(0),
                          left.size(1),
                          right.size(1)};
  const Tensor memory = allocate({cpu::outer_buffer_bytes(call) + 64}, at::kByte, left.device());
  char* const buffer =
      reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.mutable_data_ptr()) + 63) & ~uintptr_t{63});
  at::parallel_for(0, (call.tokens + kOuterTokens - 1) / kOuterTokens, 1,
                   [&](int64_t begin, int64_t end) { cpu::outer_prepare(call, buffer, begin, end); });
  at::parallel_for(0, (call.cols + kOuterPanel - 1) / kOuterPanel, 1,
                   [&](int64_t begin, int64_t end) { cpu::outer_multiply(call, buffer, begin, end); });
}

void dense_product(const Tensor& left, const Tensor& right, const OptionalTensor& bias, bool left_transposed,
                   bool right_transposed, const Tensor& out) {
  if (left_transposed && right_transposed && !bias && left.scalar_type() == at::kBFloat16 &&
      left.size(0) >= kFewestTokens && cpu::outer_serves())
    return outer_product(left, right, out);
  const Tensor a = left_transposed ? left.t() : left, b = right_transposed ? right : right.t();
  Tensor to = out;
  bias ? at::addmm_out(to, *bias, a, b) : at::mm_out(to, a, b);
}
QK_CPU_KERNEL(dense_product);

}  // namespace
}  // namespace qk
