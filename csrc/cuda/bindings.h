// Runs calls on the current stream of a GPU; a CUDA error becomes an exception.
#pragma once

#include <c10/core/Device.h>

#include "../common/call.h"

namespace qk::cuda {

void run(const Forward& call, c10::Device device);
void run(const Backward& call, c10::Device device);
void run(const Jvp& call, c10::Device device);
void run(const Quantize& call, c10::Device device);
void run(const Dequantize& call, c10::Device device);
void run(const Dynamic& call, c10::Device device);
void run(const Normal& call, c10::Device device);

// Whether there is a kernel for a call; without one it may not be run.
bool can_run(const LowbitLinear& call);
void run(const LowbitLinear& call, c10::Device device);

}  // namespace qk::cuda
