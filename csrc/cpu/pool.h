// Memory of weight-sized results, kept for the next step.
//
// A fresh 64 MiB tensor costs more in page faults than the kernel that fills it. A block returns here when the last
// tensor that uses it is gone, so nothing that autograd still needs is ever handed out again. A forked child has a copy
// of the pool, in order whatever other threads were doing.
#pragma once

#include <cstdint>

namespace qk {
namespace cpu {

constexpr int64_t kPooledBytes = 1 << 20;  // smaller blocks are left to malloc

struct MemoryBlock {
  void* memory;  // aligned to 64 bytes
  int64_t bytes;
};

// A block of at least this size. Throws std::bad_alloc.
//
// A kept block of up to twice the size serves where a new one would raise the peak: a bfloat16 weight then lies where
// the float32 gradient will, instead of the two driving each other out in every step.
MemoryBlock pool_take(int64_t bytes);
void pool_give(const MemoryBlock& block, int64_t bytes) noexcept;

// Blocks are kept only while all of them together are no more than the tensors that were alive at once.
int64_t pool_cached_bytes();
void pool_clear();

}  // namespace cpu
}  // namespace qk
