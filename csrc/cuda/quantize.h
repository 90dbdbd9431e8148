// Weights to integer codes and back on CUDA: launchers, as launch.h describes them.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/quantize.h"

namespace qk::cuda {

cudaError_t quantize(const QuantizeCall& call, cudaStream_t stream);
cudaError_t dequantize(const DequantizeCall& call, cudaStream_t stream);

}  // namespace qk::cuda
