// Instructions that C++ has no word for. The tests bring their own ptx_on_host.h.
#pragma once

#if defined(QK_HOST_CUDA)
#include <ptx_on_host.h>
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace qk::cuda {

__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<uint8_t*>(memory);
}

// Starts a copy to shared memory; of fewer than 16 bytes, the rest becomes zero. 128 bytes at once come from memory to
// the L2 cache: the neighbours are next.
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
// Ends a group of copies.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all of this thread's groups but the last `Later`.
template <int Later>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Later) : "memory");
}

// d += A B, A being int8 of 16 rows and 32 columns, B int8 of 32 rows and 8 columns. With g = lane / 4 and t = lane % 4
// a thread holds, four to a register and j the place in it, of A the rows g (a0, a2) and g + 8 (a1, a3) at columns
// 4t + j (a0, a1) and 16 + 4t + j (a2, a3); of B column g at rows 4t + j (b0) and 16 + 4t + j (b1); of d the rows g
// (d[0], d[1]) and g + 8 (d[2], d[3]) at columns 2t and 2t + 1.
__device__ __forceinline__ void multiply_add(int32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d[0] and d[1] of the above for an A of ones: sums of the columns of B.
__device__ __forceinline__ void add_columns(int32_t (&d)[2], uint32_t b0, uint32_t b1) {
  asm("{ .reg .b32 again0, again1;\n"
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, again0, again1}, {%4, %4, %4, %4}, {%2, %3}, "
      "{%0, %1, %5, %5}; }"
      : "+r"(d[0]), "+r"(d[1])
      : "r"(b0), "r"(b1), "r"(0x01010101), "r"(0));
}

// The two halves of a dependent launch (launch.h): the earlier kernel lets the later one start, the later one waits for
// the earlier one's memory. Neither exists before Hopper, where such launches are ordinary ones.
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
