// The memory cache of pool.h: a list of blocks behind one mutex.
#include "pool.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace qk {
namespace cpu {
namespace {

struct Pool {
  std::mutex mutex;
  std::vector<MemoryBlock> free_blocks;  // oldest first
  int64_t used = 0;                      // bytes that tensors asked for and still have
  int64_t peak = 0;                      // largest value of `used`
  int64_t total = 0;                     // bytes of all blocks, those of tensors and the free ones
  int64_t cached = 0;                    // bytes of the free ones

  void drop(size_t i) {
    std::free(free_blocks[i].memory);
    total -= free_blocks[i].bytes;
    cached -= free_blocks[i].bytes;
    free_blocks.erase(free_blocks.begin() + i);
  }

  // Index of the smallest free block that holds `bytes` without wasting more than half of it; among equals the newest,
  // which is the likeliest to be in a CPU cache. free_blocks.size() if there is none.
  size_t best_fit(int64_t bytes) const {
    size_t best = free_blocks.size();
    for (size_t i = 0; i < free_blocks.size(); ++i)
      if (free_blocks[i].bytes >= bytes && free_blocks[i].bytes <= 2 * bytes &&
          (best == free_blocks.size() || free_blocks[i].bytes <= free_blocks[best].bytes))
        best = i;
    return best;
  }
};

Pool& pool();

// Never destroyed: tensors may outlive static destructors. A fork takes the mutex: a child that is forked while another
// thread holds it would find it locked for ever, by a thread that does not exist in the child.
Pool* make_pool() {
#if !defined(_WIN32)
  pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
#endif
  return new Pool;
}

Pool& pool() {
  static Pool& instance = *make_pool();
  return instance;
}

}  // namespace

MemoryBlock pool_take(int64_t bytes) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const size_t fit = p.best_fit(bytes);
  if (fit < p.free_blocks.size() && (p.free_blocks[fit].bytes == bytes || p.total + bytes > p.peak)) {
    const MemoryBlock block = p.free_blocks[fit];
    p.free_blocks.erase(p.free_blocks.begin() + fit);
    p.cached -= block.bytes;
    p.used += bytes;
    p.peak = std::max(p.peak, p.used);
    return block;
  }
  while (!p.free_blocks.empty() && p.total + bytes > p.peak) p.drop(0);
  void* const memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!memory) throw std::bad_alloc();
  p.total += bytes;
  p.used += bytes;
  p.peak = std::max(p.peak, p.used);
  return {memory, bytes};
}

void pool_give(const MemoryBlock& block, int64_t bytes) noexcept {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.used -= bytes;
  p.cached += block.bytes;
  p.free_blocks.push_back(block);
  while (!p.free_blocks.empty() && p.total > p.peak)
    p.drop(0);  // the sum of block sizes may exceed it, because blocks can be larger than their tensors
}

int64_t pool_cached_bytes() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return p.cached;
}

void pool_clear() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  while (!p.free_blocks.empty()) p.drop(p.free_blocks.size() - 1);
  p.peak = p.used;
}

}  // namespace cpu
}  // namespace qk
