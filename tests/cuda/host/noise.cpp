// The launcher of noise by a C name, for ctypes.
#include "cuda/noise.h"

extern "C" {

int normal(const qk::NormalCall* call) { return qk::cuda::normal(*call, nullptr); }
}
