// Runs calls on the current stream of a GPU; a CUDA error becomes an exception.
#pragma once

#include <c10/core/Device.h>

#include "../common/call.h"

namespace qk::cuda {

void run(const FakeQuantizeCall& call, c10::Device device);
void run(const FakeQuantizeBackwardCall& call, c10::Device device);
void run(const FakeQuantizeJvpCall& call, c10::Device device);
void run(const QuantizeCall& call, c10::Device device);
void run(const DequantizeCall& call, c10::Device device);
void run(const FakeQuantizeDynamicCall& call, c10::Device device);
void run(const NormalCall& call, c10::Device device);

// Whether there is a kernel for a call; without one it may not be run.
bool can_run(const LowbitLinearCall& call);
void run(const LowbitLinearCall& call, c10::Device device);

}  // namespace qk::cuda
