// Runs CUDA kernels on the CPU: enough of the CUDA runtime for csrc/cuda to compile with g++ unchanged.
//
// The threads of a block are fibers of one OS thread. A fiber runs until it meets a barrier (__syncthreads, or a warp's
// shuffle), a warp as far as it gets before the next one starts: then a missing __syncthreads shows, and shows every
// time. The order of lanes, warps and blocks can be reversed: a result that changes with it lacks a barrier too.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  int ptxVersion;
};

namespace on_host {

inline dim3 thread_index, block_index;
inline bool reversed = false;
inline int multiprocessors = 2, most_shared = 227 << 10;
inline uint8_t *shared_begin, *shared_end;  // dynamic shared memory of a block

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s in thread %u of block %u\n", what, thread_index.x, block_index.x);
  std::abort();
}

class Block {
 public:
  static constexpr unsigned kWarp = 32;
  static constexpr size_t kStack = 64 << 10;

  // Runs f once in each thread of each block, the blocks one after another.
  void run(unsigned blocks, unsigned threads, const std::function<void()>& f) {
    if (threads == 0 || threads > 1024 || threads % kWarp != 0) fail("a block is not made of whole warps");
    resize(threads);
    body_ = &f;
    for (unsigned b = 0; b < blocks; ++b) {
      block_index = dim3(reversed ? blocks - 1 - b : b, 0, 0);
      run_block(threads);
    }
  }

  void barrier_of_warp() { wait(warp_barriers_[current_ / kWarp], kWarp); }
  void barrier_of_block() { wait(block_barrier_, static_cast<unsigned>(fibers_.size())); }

  // Every lane of the calling warp gives a value and gets that of lane `source`.
  template <class T>
  T exchange(T value, unsigned source) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    const unsigned warp = current_ / kWarp;
    std::memcpy(&slots_[current_], &value, sizeof value);
    wait(warp_barriers_[warp], kWarp);
    std::memcpy(&value, &slots_[warp * kWarp + source], sizeof value);
    wait(warp_barriers_[warp], kWarp);
    return value;
  }

  // Every lane of the calling warp gives a value, and sees those of all lanes.
  template <class T, class F>
  void gather(const T& value, F f) {
    static_assert(sizeof(T) <= sizeof(Wide));
    const unsigned warp = current_ / kWarp;
    std::memcpy(&wide_slots_[current_], &value, sizeof value);
    wait(warp_barriers_[warp], kWarp);
    f([&](unsigned lane) {
      T other;
      std::memcpy(&other, &wide_slots_[warp * kWarp + lane], sizeof other);
      return other;
    });
    wait(warp_barriers_[warp], kWarp);
  }

 private:
  struct Wide {
    uint64_t word[3];
  };
  struct Barrier {
    unsigned arrived = 0, generation = 0;
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done;
  };

  void resize(unsigned threads) {
    while (fibers_.size() > threads) fibers_.pop_back();
    while (fibers_.size() < threads) {
      fibers_.emplace_back();
      fibers_.back().stack.reset(new char[kStack]);
    }
    slots_.resize(threads);
    wide_slots_.resize(threads);
    warp_barriers_.assign(threads / kWarp, Barrier{});
    block_barrier_ = Barrier{};
  }

  void run_block(unsigned threads) {
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      fiber.done = false;
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::enter), 0);
    }
    for (unsigned left = threads; left > 0;) {
      const unsigned before = progress_;
      for (unsigned w = 0; w < threads / kWarp; ++w) left -= run_warp(reversed ? threads / kWarp - 1 - w : w);
      if (progress_ == before) fail("a barrier that not every thread reaches");
    }
  }

  // Resumes a warp's lanes until all of them wait for other warps; returns how many came to their end.
  unsigned run_warp(unsigned warp) {
    unsigned ended = 0;
    for (unsigned before = progress_ - 1; progress_ != before;) {
      before = progress_;
      for (unsigned i = 0; i < kWarp; ++i) {
        current_ = warp * kWarp + (reversed ? kWarp - 1 - i : i);
        if (fibers_[current_].done) continue;
        thread_index = dim3(current_, 0, 0);
        swapcontext(&scheduler_, &fibers_[current_].context);
        ended += fibers_[current_].done;
      }
    }
    return ended;
  }

  static void enter() {
    Block& block = Block::instance();
    (*block.body_)();
    block.fibers_[block.current_].done = true;
    ++block.progress_;
  }

  void wait(Barrier& barrier, unsigned expected) {
    const unsigned generation = barrier.generation;
    ++progress_;
    if (++barrier.arrived == expected) {
      barrier.arrived = 0;
      ++barrier.generation;
      return;
    }
    while (barrier.generation == generation) swapcontext(&fibers_[current_].context, &scheduler_);
  }

 public:
  static Block& instance() {
    static Block block;
    return block;
  }

 private:
  const std::function<void()>* body_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<uint64_t> slots_;
  std::vector<Wide> wide_slots_;
  std::vector<Barrier> warp_barriers_;
  Barrier block_barrier_;
  ucontext_t scheduler_;
  unsigned current_ = 0, progress_ = 0;
};

template <class T>
void check_aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) fail("a misaligned access");
}

template <class To, class From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

}  // namespace on_host

#define threadIdx on_host::thread_index
#define blockIdx on_host::block_index

template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Args&&... args) {
  if (config->gridDim.x == 0 || config->dynamicSmemBytes > static_cast<size_t>(on_host::most_shared))
    return cudaErrorInvalidConfiguration;
  // Blocks find what the one before has left, the first one NaN.
  std::vector<uint8_t> shared(config->dynamicSmemBytes + 16, 0xFF);
  const size_t lead = (16 - reinterpret_cast<uintptr_t>(shared.data()) % 16) % 16;
  on_host::shared_begin = shared.data() + lead;
  on_host::shared_end = on_host::shared_begin + config->dynamicSmemBytes;
  on_host::Block::instance().run(config->gridDim.x, config->blockDim.x, [&] { kernel(args...); });
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? on_host::multiprocessors : on_host::most_shared;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->ptxVersion = 80;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

inline void __syncthreads() { on_host::Block::instance().barrier_of_block(); }
inline void __syncwarp() { on_host::Block::instance().barrier_of_warp(); }

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return out;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  if (mask != 0xFFFFFFFFu) on_host::fail("a shuffle of part of a warp");
  return on_host::Block::instance().exchange(value, (threadIdx.x % 32) ^ static_cast<unsigned>(lane_mask));
}

template <class T>
T __ldg(const T* p) {
  on_host::check_aligned(p);
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  on_host::check_aligned(p);
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  on_host::check_aligned(p);
  *p = value;
}

inline int32_t __float_as_int(float x) { return on_host::bits<int32_t>(x); }
inline float __int_as_float(int32_t x) { return on_host::bits<float>(x); }
inline int64_t __double_as_longlong(double x) { return on_host::bits<int64_t>(x); }
inline double __longlong_as_double(int64_t x) { return on_host::bits<double>(x); }
using std::max;
using std::min;

// bfloat16 and float16 as their bits, rounded to nearest even.
struct __nv_bfloat16 {
  uint16_t x;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 h) { return on_host::bits<float>(static_cast<uint32_t>(h.x) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  const uint32_t b = on_host::bits<uint32_t>(f);
  if (f != f) return {0x7FFF};
  return {static_cast<uint16_t>((b + 0x7FFF + ((b >> 16) & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}

struct __half {
  uint16_t x;
};
struct __half2 {
  __half x, y;
};
inline float __half2float(__half h) { return static_cast<float>(on_host::bits<_Float16>(h.x)); }
inline __half __float2half_rn(float f) { return {on_host::bits<uint16_t>(static_cast<_Float16>(f))}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
