// The CUDA kernels: each call enqueues on the stream and returns; pointers are on the stream's device.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/call.h"

namespace qk::cuda {

cudaError_t fake_quantize(const FakeQuantizeCall& call, cudaStream_t stream);

// workspace: as many bytes as fake_quantize_backward_workspace says, uninitialized, aligned to 8; null if it says 0.
size_t fake_quantize_backward_workspace(const FakeQuantizeBackwardCall& call);
cudaError_t fake_quantize_backward(const FakeQuantizeBackwardCall& call, void* workspace, cudaStream_t stream);

cudaError_t fake_quantize_jvp(const FakeQuantizeJvpCall& call, cudaStream_t stream);

cudaError_t quantize(const QuantizeCall& call, cudaStream_t stream);
cudaError_t dequantize(const DequantizeCall& call, cudaStream_t stream);

cudaError_t fake_quantize_dynamic(const FakeQuantizeDynamicCall& call, cudaStream_t stream);

cudaError_t normal(const NormalCall& call, cudaStream_t stream);

// At most eight tokens. Workspace as above.
bool lowbit_gemv_serves(const LowbitLinearCall& call);
cudaError_t lowbit_gemv_workspace(const LowbitLinearCall& call, size_t* bytes);
cudaError_t lowbit_gemv(const LowbitLinearCall& call, void* workspace, cudaStream_t stream);

}  // namespace qk::cuda
