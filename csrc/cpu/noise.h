// Noise by itself on the CPU. begin and end count spans of kNoiseSpan elements.
#pragma once

#include "../common/noise.h"
#include "isa_kernel.h"

namespace qk {

QK_ISA_KERNEL(normal, void(const NormalCall&, int64_t begin, int64_t end));

}  // namespace qk
