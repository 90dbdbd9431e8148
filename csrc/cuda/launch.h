// How kernels are launched: by an ordinary function call instead of <<<>>>, so that tests can compile the same source
// for the CPU.
//
// A launcher, which the header of an op declares, enqueues kernels on a stream and returns. Pointers of the call are on
// the stream's device. This folder includes no header of torch (tests/cuda/on_host.py).
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace qk::cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kBlocks = 2;     // that fit a multiprocessor, at least; left to itself ptxas spills registers to fit more
constexpr int kWarp = 32;

// A dependent launch may begin before the previous kernel of the stream has ended; the kernel itself has to wait for it
// (ptx.h).
template <class... Parameters, class... Args>
cudaError_t launch_as(bool dependent, void (*kernel)(Parameters...), int64_t grid, int block, size_t shared,
                      cudaStream_t stream, Args&&... args) {
  if (grid > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared, cudaStream_t stream,
                   Args&&... args) {
  return launch_as(false, kernel, grid, block, shared, stream, std::forward<Args>(args)...);
}

}  // namespace qk::cuda
