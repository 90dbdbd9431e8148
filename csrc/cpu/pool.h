// A cache of memory for weight-sized results (a MiB and more), reused from one training step to the next.
//
// Why: the page faults of a fresh 64 MiB tensor cost more than the kernel that fills it. A block comes back when the
// last tensor that uses it is freed, so memory that autograd still needs is never handed out again. Every function may
// be called from any thread, and in a forked child: the fork waits until no thread is inside.
#pragma once

#include <cstdint>

namespace qk {
namespace cpu {

constexpr int64_t kPooledBytes = 1 << 20;  // at::empty takes care of smaller tensors

struct MemoryBlock {
  void* memory;  // aligned to 64 bytes
  int64_t bytes;
};

// Returns a block of at least this size, not initialized. Throws std::bad_alloc.
//
// A cached block of up to twice the size is used where a new one would raise the peak: under autocast a bfloat16 weight
// and its float32 gradient then take turns in one block, and no longer evict each other in every step.
MemoryBlock pool_take(int64_t bytes);
// Takes back a block that was taken for `bytes` bytes.
void pool_give(const MemoryBlock& block, int64_t bytes) noexcept;

// Bytes that are cached. Blocks are freed as soon as all blocks, in use or not, exceed the peak of the bytes in use.
int64_t pool_cached_bytes();
// Frees what is cached and forgets the peak.
void pool_clear();

}  // namespace cpu
}  // namespace qk
