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
  std::vector<MemoryBlock> kept;  // oldest first
  int64_t wanted = 0;             // bytes of the tensors that are alive
  int64_t peak = 0;               // most that was wanted at once
  int64_t held = 0;               // bytes of all blocks
  int64_t cached = 0;             // of those, bytes kept

  void drop(size_t i) {
    std::free(kept[i].memory);
    held -= kept[i].bytes;
    cached -= kept[i].bytes;
    kept.erase(kept.begin() + i);
  }

  // The smallest kept block that holds `bytes` without wasting more than half of it; of equals the newest, which is
  // the likeliest to be in a cache. kept.size() if there is none.
  size_t best_fit(int64_t bytes) const {
    size_t best = kept.size();
    for (size_t i = 0; i < kept.size(); ++i)
      if (kept[i].bytes >= bytes && kept[i].bytes <= 2 * bytes &&
          (best == kept.size() || kept[i].bytes <= kept[best].bytes))
        best = i;
    return best;
  }
};

Pool& pool();

// Never destroyed: tensors may outlive static destructors. A fork waits for the mutex and holds it meanwhile, or a
// child that is forked while another thread allocates would find it locked for ever, by a thread that it does not have.
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
  if (fit < p.kept.size() && (p.kept[fit].bytes == bytes || p.held + bytes > p.peak)) {
    const MemoryBlock block = p.kept[fit];
    p.kept.erase(p.kept.begin() + fit);
    p.cached -= block.bytes;
    p.wanted += bytes;
    p.peak = std::max(p.peak, p.wanted);
    return block;
  }
  while (!p.kept.empty() && p.held + bytes > p.peak) p.drop(0);
  void* const memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!memory) throw std::bad_alloc();
  p.held += bytes;
  p.wanted += bytes;
  p.peak = std::max(p.peak, p.wanted);
  return {memory, bytes};
}

void pool_give(const MemoryBlock& block, int64_t bytes) noexcept {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.wanted -= bytes;
  p.cached += block.bytes;
  p.kept.push_back(block);
  while (!p.kept.empty() && p.held > p.peak) p.drop(0);  // blocks larger than their tensors are in use
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
  p.peak = p.wanted;
}

}  // namespace cpu
}  // namespace qk
