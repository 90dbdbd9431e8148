// Noise by itself on CUDA: a launcher, as launch.h describes it.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/noise.h"

namespace qk::cuda {

cudaError_t normal(const NormalCall& call, cudaStream_t stream);

}  // namespace qk::cuda
