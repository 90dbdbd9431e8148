// The calls on a GPU: sets the device, takes torch's current stream, allocates workspaces from torch's pool.
#include "bindings.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels.h"

namespace qk::cuda {
namespace {

template <class F>
void on(c10::Device device, F f) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(f(c10::cuda::getCurrentCUDAStream(device.index()).stream()));
}

}  // namespace

void run(const FakeQuantizeCall& call, c10::Device device) {
  on(device, [&](cudaStream_t stream) { return fake_quantize(call, stream); });
}

void run(const FakeQuantizeBackwardCall& call, c10::Device device) {
  on(device, [&](cudaStream_t stream) {
    // Freed to the pool of the stream before the kernel has run: what reuses it is enqueued behind the kernel.
    const auto bytes = static_cast<int64_t>(fake_quantize_backward_workspace(call));
    const at::Tensor workspace = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
    return fake_quantize_backward(call, workspace.mutable_data_ptr(), stream);
  });
}

void run(const FakeQuantizeJvpCall& call, c10::Device device) {
  on(device, [&](cudaStream_t stream) { return fake_quantize_jvp(call, stream); });
}

void run(const QuantizeCall& call, c10::Device device) {
  on(device, [&](cudaStream_t stream) { return quantize(call, stream); });
}

void run(const DequantizeCall& call, c10::Device device) {
  on(device, [&](cudaStream_t stream) { return dequantize(call, stream); });
}

void run(const FakeQuantizeDynamicCall& call, c10::Device device) {
  on(device, [&](cudaStream_t stream) { return fake_quantize_dynamic(call, stream); });
}

void run(const NormalCall& call, c10::Device device) {
  on(device, [&](cudaStream_t stream) { return normal(call, stream); });
}

bool can_run(const LowbitLinearCall& call) { return lowbit_gemv_serves(call); }

void run(const LowbitLinearCall& call, c10::Device device) {
  on(device, [&](cudaStream_t stream) {
    size_t bytes = 0;
    const cudaError_t error = lowbit_gemv_workspace(call, &bytes);
    if (error != cudaSuccess) return error;
    const at::Tensor workspace =
        at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte).device(device));
    return lowbit_gemv(call, workspace.mutable_data_ptr(), stream);
  });
}

}  // namespace qk::cuda
