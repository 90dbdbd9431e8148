// The ways to multiply with a packed weight that this ISA has.
//
// float32 runs on any ISA. The others need AVX-512 with VNNI: lookups VBMI too, bfloat16 in registers BF16 too, tiles
// AMX. Groups have to be whole 32-bit words of codes, or for tiles whole 32 bytes of operands. They are within a
// rounding of float32 and up to ten times as fast.
#pragma once

#include "lowbit_plan.h"

#if defined(__AVX512VNNI__)
#define QK_LOWBIT_VNNI
#endif

namespace qk {
namespace QK_ISA {

extern const LowbitKernel float_kernel;  // lowbit_float.cpp: codes become float32
#if defined(QK_LOWBIT_VNNI)
extern const LowbitKernel int8_kernel;  // lowbit_mac.cpp: int8 activations, as they are or three limbs of 24 bits
// lowbit_tiles.cpp: both by AMX, from a few activation rows on.
extern const LowbitKernel int8_tiles_kernel, bf16_tiles_kernel;
#if defined(__AVX512VBMI__)
extern const LowbitKernel lut_kernel;  // lowbit_lut.cpp: 1 and 2 bits, sums of few activations looked up by the codes
#endif
#if defined(__AVX512BF16__)
extern const LowbitKernel bf16_kernel;  // lowbit_mac.cpp: bfloat16 activations times codes as bfloat16, which is exact
#endif
#endif

}  // namespace QK_ISA
}  // namespace qk
