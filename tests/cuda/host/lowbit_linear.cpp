// The launchers of products with packed weights by C names, for ctypes.
#include "cuda/lowbit_linear.h"

extern "C" {

bool lowbit_gemv_serves(const qk::LowbitLinearCall* call) { return qk::cuda::lowbit_gemv_serves(*call); }
int lowbit_gemv_workspace(const qk::LowbitLinearCall* call, size_t* bytes) {
  return qk::cuda::lowbit_gemv_workspace(*call, bytes);
}
int lowbit_gemv(const qk::LowbitLinearCall* call, void* workspace) {
  return qk::cuda::lowbit_gemv(*call, workspace, nullptr);
}
}
