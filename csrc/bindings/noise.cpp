// Noise by itself.
#include "../cpu/noise.h"

#include "gpu.h"
#include "registry.h"
#include "tensors.h"
#if defined(QK_WITH_CUDA)
#include "../cuda/noise.h"
#endif

namespace qk {
namespace {

void normal(const Tensor& seed, int64_t numel, int64_t stream, const Tensor& out) {
  const NormalCall call{seed.const_data_ptr<int64_t>(), out.mutable_data_ptr<float>(), numel,
                        static_cast<uint32_t>(stream)};
  if (QK_RUN_ON_GPU(call, seed.device(), cuda::normal)) return;
  at::parallel_for(0, (numel + kNoiseSpan - 1) / kNoiseSpan, 1,
                   [&](int64_t begin, int64_t end) { cpu::normal(call, begin, end); });
}

QK_KERNEL(normal);

}  // namespace
}  // namespace qk
