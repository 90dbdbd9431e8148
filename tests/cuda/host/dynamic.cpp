// The launcher of dynamic quantization by a C name, for ctypes.
#include "cuda/dynamic.h"

extern "C" {

int fake_quantize_dynamic(const qk::FakeQuantizeDynamicCall* call) {
  return qk::cuda::fake_quantize_dynamic(*call, nullptr);
}
}
