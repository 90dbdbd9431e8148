// Runs a call where its tensors are. A family of ops overloads `run_on_cpu` in namespace qk, before its first use.
#pragma once

#include "tensors.h"
#if defined(QK_WITH_CUDA)
#include "../cuda/bindings.h"
#endif

namespace qk {

template <class Call>
void run(const Call& call, at::Device device) {
#if defined(QK_WITH_CUDA)
  if (device.is_cuda()) return cuda::run(call, device);
#endif
  run_on_cpu(call);
}

}  // namespace qk
