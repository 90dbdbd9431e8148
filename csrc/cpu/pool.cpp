#include "pool.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace qk {
namespace cpu {
namespace {

struct Block {
  void* p;
  int64_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> kept;  // oldest first
  int64_t in_use = 0, cached = 0, peak = 0;

  void drop(size_t i) {
    std::free(kept[i].p);
    cached -= kept[i].bytes;
    kept.erase(kept.begin() + i);
  }
};

// Never destroyed: tensors may outlive static destructors.
Pool& pool() {
  static Pool& instance = *new Pool;
  return instance;
}

}  // namespace

void* pool_take(int64_t bytes) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  void* block = nullptr;
  // The newest of the right size is the likeliest to be in a cache.
  const auto found = std::find_if(p.kept.rbegin(), p.kept.rend(), [&](const Block& b) { return b.bytes == bytes; });
  if (found != p.kept.rend()) {
    block = found->p;
    p.cached -= bytes;
    p.kept.erase(std::next(found).base());
  } else {
    while (!p.kept.empty() && p.in_use + p.cached + bytes > p.peak) p.drop(0);
    block = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!block) throw std::bad_alloc();
  }
  p.in_use += bytes;
  p.peak = std::max(p.peak, p.in_use);
  return block;
}

void pool_give(void* block, int64_t bytes) noexcept {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.in_use -= bytes;
  p.cached += bytes;
  p.kept.push_back({block, bytes});
}

int64_t pool_cached_bytes() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return p.cached;
}

void pool_clear() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  while (!p.kept.empty()) p.drop(p.kept.size() - 1);
  p.peak = p.in_use;
}

}  // namespace cpu
}  // namespace qk
