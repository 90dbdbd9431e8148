// Memory of weight-sized results, kept for the next step.
//
// A fresh 64 MiB tensor costs more in page faults than the kernel that fills it. A block returns here when the last
// tensor that uses it is gone, so nothing that autograd still needs is ever handed out again.
#pragma once

#include <cstdint>

namespace qk {
namespace cpu {

constexpr int64_t kPooledBytes = 1 << 20;  // smaller blocks are left to malloc

// A block of exactly this size, aligned to 64 bytes. Throws std::bad_alloc.
void* pool_take(int64_t bytes);
void pool_give(void* p, int64_t bytes) noexcept;

// Blocks in use and kept never exceed the most that was in use at once, so the pool does not raise the peak.
int64_t pool_cached_bytes();
void pool_clear();

}  // namespace cpu
}  // namespace qk
