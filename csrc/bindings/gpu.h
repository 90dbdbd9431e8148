// How bindings run a call on a GPU. QK_RUN_ON_GPU is for every build; the rest is there in builds with CUDA only.
#pragma once

#if defined(QK_WITH_CUDA)
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace qk {

// Calls launch(stream) with torch's current stream of a GPU; its cudaError_t becomes an exception.
template <class F>
void launch_on(at::Device device, F launch) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(launch(c10::cuda::getCurrentCUDAStream(device.index()).stream()));
}

// Memory for one launch, from torch's pool. It may be freed before the kernel has run: what reuses it is enqueued
// behind the kernel.
inline at::Tensor workspace(size_t bytes, at::Device device) {
  return at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte).device(device));
}

}  // namespace qk

// Runs a call by a launcher if `device` is a GPU; its value is whether it did. A build without CUDA has no launchers,
// so there it is false and does not look at the launcher's name.
#define QK_RUN_ON_GPU(call, device, launcher) \
  ((device).is_cuda() && (::qk::launch_on(device, [&](cudaStream_t stream) { return launcher(call, stream); }), true))
#else
#define QK_RUN_ON_GPU(call, device, launcher) false
#endif
