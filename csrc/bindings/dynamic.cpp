// Dynamic quantization of activations.
#include "dynamic.h"

#include "../cpu/dynamic.h"
#include "gpu.h"
#include "registry.h"
#if defined(QK_WITH_CUDA)
#include "../cuda/dynamic.h"
#endif

namespace qk {

void fake_quantize_dynamic(const Tensor& x, int64_t bits, const Tensor& out) {
  const int64_t cols = x.size(-1), rows = cols ? x.numel() / cols : 0;
  const FakeQuantizeDynamicCall call{x.const_data_ptr(), out.mutable_data_ptr(),    rows, cols,
                                     dtype_of(x),        static_cast<int32_t>(bits)};
  if (QK_RUN_ON_GPU(call, x.device(), cuda::fake_quantize_dynamic)) return;
  at::parallel_for(0, rows, grain_of_rows(cols),
                   [&](int64_t begin, int64_t end) { cpu::fake_quantize_dynamic(call, begin, end); });
}

namespace {

QK_KERNEL(fake_quantize_dynamic);

}  // namespace
}  // namespace qk
