// Fake quantization of weights on CUDA: launchers, as launch.h describes them.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/fake_quantize.h"

namespace qk::cuda {

cudaError_t fake_quantize(const FakeQuantizeCall& call, cudaStream_t stream);

// workspace: as many bytes as fake_quantize_backward_workspace returns, uninitialized, aligned to 8; null if that is 0.
size_t fake_quantize_backward_workspace(const FakeQuantizeBackwardCall& call);
cudaError_t fake_quantize_backward(const FakeQuantizeBackwardCall& call, void* workspace, cudaStream_t stream);

cudaError_t fake_quantize_jvp(const FakeQuantizeJvpCall& call, cudaStream_t stream);

}  // namespace qk::cuda
