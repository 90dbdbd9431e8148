// Instructions that CUDA C++ has no function for. Tests on a CPU replace this file by their ptx_on_host.h.
#pragma once

#if defined(QK_HOST_CUDA)
#include <ptx_on_host.h>
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace qk::cuda {

__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<uint8_t*>(memory);
}

// Starts a copy of 16 bytes to shared memory; only the first `bytes` of them are read, the rest becomes zero. The L2
// cache gets 128 bytes, because the neighbours are needed next.
__device__ __forceinline__ void copy_16_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_4_async(void* shared, const void* global, int bytes) {
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(bytes)
      : "memory");
}
// Closes the current group of copies.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread except the last `Later`.
template <int Later>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Later) : "memory");
}

// d += A B with A int8 [16, 32], B int8 [32, 8] and d int32 [16, 8], spread over the lanes of a warp. With g = lane / 4
// and t = lane % 4 a lane holds, byte j of a register being column (A) or row (B) ... + j:
//
//     A        cols 4t ..  16 + 4t ..      B            col g        d         col 2t  2t + 1
//     row g        a0      a2              rows 4t ..      b0        row g      d[0]    d[1]
//     row g + 8    a1      a3              16 + 4t ..      b1        row g + 8  d[2]    d[3]
__device__ __forceinline__ void multiply_add(int32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The above for an A of ones, of which d[0] and d[1] are kept: d += sums of the columns of B.
__device__ __forceinline__ void add_columns(int32_t (&d)[2], uint32_t b0, uint32_t b1) {
  asm("{ .reg .b32 again0, again1;\n"
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, again0, again1}, {%4, %4, %4, %4}, {%2, %3}, "
      "{%0, %1, %5, %5}; }"
      : "+r"(d[0]), "+r"(d[1])
      : "r"(b0), "r"(b1), "r"(0x01010101), "r"(0));
}

// d += A B with A [16, 16] and B [16, 8] of bfloat16 or float16 (X) and d float32 [16, 8]. As above, the lower half of
// a register being the first column (A) or row (B), the upper half the second:
//
//     A        cols 2t, 2t + 1   2t + 8, 2t + 9   B                    col g     d         col 2t  2t + 1
//     row g          a0               a2          rows 2t, 2t + 1        b0      row g      d[0]    d[1]
//     row g + 8      a1               a3          2t + 8, 2t + 9         b1      row g + 8  d[2]    d[3]
template <class X>
__device__ __forceinline__ void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<X, __nv_bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// (a & mask) | c in one instruction; the compiler makes two of it where mask and c are constants.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(c));
  return d;
}

// a * b + c for pairs of bfloat16 or float16 (X), rounded once; in its uses the result is exact.
template <class X>
__device__ __forceinline__ uint32_t exact_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  if constexpr (std::is_same_v<X, __nv_bfloat16>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// The two sides of a dependent launch (launch.h): the earlier kernel lets the later one start, and the later one waits
// until the earlier one's writes are visible. Before Hopper there are no such instructions, and launches are ordinary.
__device__ __forceinline__ void let_dependents_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_earlier_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace qk::cuda

#endif
