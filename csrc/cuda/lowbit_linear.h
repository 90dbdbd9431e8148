// Products with packed weights on CUDA: a launcher, as launch.h describes it.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/lowbit_linear.h"

namespace qk::cuda {

// y = x W^T + bias for at most eight tokens of one expert; serves says whether a call is one of those. The workspace is
// uninitialized, of as many bytes as lowbit_gemv_workspace says, aligned to 16; null if that is 0.
bool lowbit_gemv_serves(const LowbitLinearCall& call);
cudaError_t lowbit_gemv_workspace(const LowbitLinearCall& call, size_t* bytes);
cudaError_t lowbit_gemv(const LowbitLinearCall& call, void* workspace, cudaStream_t stream);

}  // namespace qk::cuda
