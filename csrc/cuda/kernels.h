// The CUDA kernels' launchers: each call enqueues kernels on the stream and returns. Pointers are on the stream's
// device. No header of torch: tests compile this folder for the CPU (tests/cuda/on_host.py).
#pragma once

#include <cuda_runtime_api.h>

#include "../common/call.h"

namespace qk::cuda {

cudaError_t fake_quantize(const FakeQuantizeCall& call, cudaStream_t stream);

// workspace: as many bytes as fake_quantize_backward_workspace returns, uninitialized, aligned to 8; null if that is 0.
size_t fake_quantize_backward_workspace(const FakeQuantizeBackwardCall& call);
cudaError_t fake_quantize_backward(const FakeQuantizeBackwardCall& call, void* workspace, cudaStream_t stream);

cudaError_t fake_quantize_jvp(const FakeQuantizeJvpCall& call, cudaStream_t stream);

cudaError_t quantize(const QuantizeCall& call, cudaStream_t stream);
cudaError_t dequantize(const DequantizeCall& call, cudaStream_t stream);

cudaError_t fake_quantize_dynamic(const FakeQuantizeDynamicCall& call, cudaStream_t stream);

cudaError_t normal(const NormalCall& call, cudaStream_t stream);

// y = x W^T + bias for at most eight tokens of one expert; serves says whether a call is one of those. The workspace is
// as above, aligned to 16.
bool lowbit_gemv_serves(const LowbitLinearCall& call);
cudaError_t lowbit_gemv_workspace(const LowbitLinearCall& call, size_t* bytes);
cudaError_t lowbit_gemv(const LowbitLinearCall& call, void* workspace, cudaStream_t stream);

}  // namespace qk::cuda
