// The CUDA kernels: each call enqueues on the stream and returns; pointers are on the stream's device.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/call.h"

namespace qk::cuda {

cudaError_t fake_quantize(const Forward& call, cudaStream_t stream);

// workspace: as many bytes as fake_quantize_backward_workspace says, uninitialized, aligned to 8; null if it says 0.
size_t fake_quantize_backward_workspace(const Backward& call);
cudaError_t fake_quantize_backward(const Backward& call, void* workspace, cudaStream_t stream);

cudaError_t fake_quantize_jvp(const Jvp& call, cudaStream_t stream);

cudaError_t quantize(const Quantize& call, cudaStream_t stream);
cudaError_t dequantize(const Dequantize& call, cudaStream_t stream);

cudaError_t fake_quantize_dynamic(const Dynamic& call, cudaStream_t stream);

cudaError_t normal(const Normal& call, cudaStream_t stream);

// At most eight tokens. Workspace as above.
bool lowbit_gemv_serves(const LowbitLinear& call);
cudaError_t lowbit_gemv_workspace(const LowbitLinear& call, size_t* bytes);
cudaError_t lowbit_gemv(const LowbitLinear& call, void* workspace, cudaStream_t stream);

}  // namespace qk::cuda
