// Standard normals by themselves, on a GPU: the noise that kernels draw, for tests and other backends.
#include "noise.h"
#include "quant_weight.h"

namespace qk::cuda {

__global__ void __launch_bounds__(kThreads, kBlocks)
    normal_kernel(const int64_t* seed, float* out, int64_t numel, uint32_t stream, bool whole) {
  const int64_t first = 4 * (int64_t(blockIdx.x) * kThreads + threadIdx.x);
  if (first >= numel) return;
  float z[4];
  draw(static_cast<uint64_t>(__ldg(seed)), first, stream, z);
  if (whole && first + 4 <= numel) {
    store<false>(out + first, narrow<float>(z));
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (first + j < numel) out[first + j] = z[j];
  }
}

cudaError_t normal(const NormalCall& call, cudaStream_t stream) {
  if (call.numel == 0) return cudaSuccess;
  const int64_t per_block = 4 * kThreads;
  return launch(normal_kernel, (call.numel + per_block - 1) / per_block, kThreads, 0, stream, call.seed, call.out,
                call.numel, call.stream, aligned<4>(call.out));
}

}  // namespace qk::cuda
