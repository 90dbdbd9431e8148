// The launchers by C names, for ctypes; and by themselves the division of rows and of numbers.
#include "cuda/divide.h"
#include "cuda/kernels.h"
#include "cuda/tile.h"

extern "C" {

void set_reversed(bool reversed) { on_host::reversed = reversed; }

int fake_quantize(const qk::FakeQuantizeCall* call) { return qk::cuda::fake_quantize(*call, nullptr); }
int fake_quantize_jvp(const qk::FakeQuantizeJvpCall* call) { return qk::cuda::fake_quantize_jvp(*call, nullptr); }
int quantize(const qk::QuantizeCall* call) { return qk::cuda::quantize(*call, nullptr); }
int dequantize(const qk::DequantizeCall* call) { return qk::cuda::dequantize(*call, nullptr); }
int fake_quantize_dynamic(const qk::FakeQuantizeDynamicCall* call) {
  return qk::cuda::fake_quantize_dynamic(*call, nullptr);
}
int normal(const qk::NormalCall* call) { return qk::cuda::normal(*call, nullptr); }

bool lowbit_gemv_serves(const qk::LowbitLinearCall* call) { return qk::cuda::lowbit_gemv_serves(*call); }
int lowbit_gemv_workspace(const qk::LowbitLinearCall* call, size_t* bytes) {
  return qk::cuda::lowbit_gemv_workspace(*call, bytes);
}
int lowbit_gemv(const qk::LowbitLinearCall* call, void* workspace) {
  return qk::cuda::lowbit_gemv(*call, workspace, nullptr);
}
void set_device(int multiprocessors, int shared) {
  on_host::multiprocessors = multiprocessors;
  on_host::most_shared = shared;
}

size_t fake_quantize_backward_workspace(const qk::FakeQuantizeBackwardCall* call) {
  return qk::cuda::fake_quantize_backward_workspace(*call);
}
int fake_quantize_backward(const qk::FakeQuantizeBackwardCall* call, void* workspace) {
  return qk::cuda::fake_quantize_backward(*call, workspace, nullptr);
}

void layout(int64_t rows, int64_t cols, int v, int u, int64_t* out) {
  const qk::cuda::TileLayout layout(rows, cols, v, u, true);
  out[0] = layout.pieces;
  out[1] = layout.piece_cols;
}

void divide(const float* a, const float* b, float* q, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float numerator[1] = {a[i]};
    float quotient[1];
    qk::cuda::Divisor<float>(b[i]).divide<true>(numerator, quotient);
    q[i] = quotient[0];
  }
}
}
