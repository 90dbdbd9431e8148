// Dynamic quantization of activations on CUDA: a launcher, as launch.h describes it.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/dynamic.h"

namespace qk::cuda {

cudaError_t fake_quantize_dynamic(const FakeQuantizeDynamicCall& call, cudaStream_t stream);

}  // namespace qk::cuda
