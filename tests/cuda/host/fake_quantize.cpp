// The launchers of fake quantization by C names, for ctypes.
#include "cuda/fake_quantize.h"

extern "C" {

int fake_quantize(const qk::FakeQuantizeCall* call) { return qk::cuda::fake_quantize(*call, nullptr); }
int fake_quantize_jvp(const qk::FakeQuantizeJvpCall* call) { return qk::cuda::fake_quantize_jvp(*call, nullptr); }
size_t fake_quantize_backward_workspace(const qk::FakeQuantizeBackwardCall* call) {
  return qk::cuda::fake_quantize_backward_workspace(*call);
}
int fake_quantize_backward(const qk::FakeQuantizeBackwardCall* call, void* workspace) {
  return qk::cuda::fake_quantize_backward(*call, workspace, nullptr);
}
}
