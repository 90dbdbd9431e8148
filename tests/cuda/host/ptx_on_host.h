// csrc/cuda/ptx.h for the CPU. Copies happen as late as a wait allows, and what they will overwrite is poisoned at
// once: reading too early shows, and so does overwriting what another lane has yet to read.
#pragma once

#include <array>
#include <vector>

#include "cuda_on_host.h"

namespace on_host {

struct Copy {
  uint8_t* to;
  const uint8_t* from;
  int bytes, size;
};
// By thread of the block: groups that have not been waited for, the last one still open.
inline std::vector<std::vector<std::vector<Copy>>> copies;

inline void check_shared(const void* p, size_t size) {
  const auto at = static_cast<const uint8_t*>(p);
  if (at < shared_begin || at + size > shared_end) fail("a copy beyond shared memory");
}

inline std::vector<std::vector<Copy>>& own_copies() {
  if (copies.size() <= thread_index.x) copies.resize(thread_index.x + 1);
  auto& own = copies[thread_index.x];
  if (own.empty()) own.emplace_back();
  return own;
}

inline void copy_async(void* to, const void* from, int bytes, int size) {
  check_shared(to, static_cast<size_t>(size));
  if (reinterpret_cast<uintptr_t>(to) % static_cast<uintptr_t>(size) != 0 ||
      reinterpret_cast<uintptr_t>(from) % static_cast<uintptr_t>(size) != 0)
    fail("a misaligned copy");
  std::memset(to, 0xFF, static_cast<size_t>(size));
  own_copies().back().push_back({static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from), bytes, size});
}

inline void wait_copies(size_t later) {
  auto& own = own_copies();
  while (own.size() - 1 > later) {
    for (const Copy& copy : own.front()) {
      std::memset(copy.to, 0, static_cast<size_t>(copy.size));
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    }
    own.erase(own.begin());
  }
}

}  // namespace on_host

namespace qk::cuda {

inline uint8_t* dynamic_shared() { return on_host::shared_begin; }

inline void copy_16_async(void* to, const void* from, int bytes) { on_host::copy_async(to, from, bytes, 16); }
inline void copy_4_async(void* to, const void* from, int bytes) { on_host::copy_async(to, from, bytes, 4); }
inline void copy_commit() { on_host::own_copies().emplace_back(); }
template <int Later>
void copy_wait() {
  on_host::wait_copies(Later);
}

inline void multiply_add(int32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                         uint32_t b1) {
  using Registers = std::array<uint32_t, 6>;
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  on_host::Block::instance().gather(Registers{a0, a1, a2, a3, b0, b1}, [&](const auto& of) {
    const auto at = [](uint32_t word, unsigned j) { return int32_t{static_cast<int8_t>(word >> 8 * j)}; };
    for (unsigned k = 0; k < 4; ++k) {
      const Registers row = of(g * 4 + k), even = of(2 * t * 4 + k), odd = of((2 * t + 1) * 4 + k);
      for (unsigned j = 0; j < 4; ++j)
        for (unsigned half = 0; half < 2; ++half) {
          const int32_t upper = at(row[2 * half], j), lower = at(row[2 * half + 1], j);
          const int32_t left = at(even[4 + half], j), right = at(odd[4 + half], j);
          d[0] += upper * left;
          d[1] += upper * right;
          d[2] += lower * left;
          d[3] += lower * right;
        }
    }
  });
}
inline void add_columns(int32_t (&d)[2], uint32_t b0, uint32_t b1) {
  int32_t all[4] = {d[0], d[1], 0, 0};
  multiply_add(all, 0x01010101, 0x01010101, 0x01010101, 0x01010101, b0, b1);
  d[0] = all[0];
  d[1] = all[1];
}

inline double number_of(uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }
inline double number_of(uint16_t bits, __half) { return __half2float({bits}); }

// mma.m16n8k16 as the PTX ISA spreads its matrices over lanes. Rounding is not specified there; tensor cores are known
// to round sums towards zero, which is what tests should allow for.
template <class X>
void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  using Registers = std::array<uint32_t, 6>;
  const unsigned lane = threadIdx.x % 32;
  on_host::Block::instance().gather(Registers{a0, a1, a2, a3, b0, b1}, [&](const auto& of) {
    const auto half = [](uint32_t word, unsigned upper) {
      return number_of(static_cast<uint16_t>(word >> 16 * upper), X());
    };
    const auto a = [&](unsigned row, unsigned col) {
      const Registers registers = of(row % 8 * 4 + col % 8 / 2);
      return half(registers[row / 8 + 2 * (col / 8)], col % 2);
    };
    const auto b = [&](unsigned row, unsigned col) {
      const Registers registers = of(col * 4 + row % 8 / 2);
      return half(registers[4 + row / 8], row % 2);
    };
    for (unsigned i = 0; i < 4; ++i) {
      double sum = double{d[i]};
      for (unsigned k = 0; k < 16; ++k) sum += a(lane / 4 + 8 * (i / 2), k) * b(k, lane % 4 * 2 + i % 2);
      d[i] = static_cast<float>(sum);
      if (std::isfinite(sum) && std::abs(double{d[i]}) > std::abs(sum)) d[i] = std::nextafter(d[i], 0.0f);
    }
  });
}

inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t c) { return (a & mask) | c; }

template <class X>
uint32_t exact_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (unsigned shift = 0; shift < 32; shift += 16) {
    const auto of = [&](uint32_t word) { return number_of(static_cast<uint16_t>(word >> shift), X()); };
    const double exact = of(a) * of(b) + of(c);
    uint16_t rounded;
    if constexpr (std::is_same_v<X, __nv_bfloat16>)
      rounded = __float2bfloat16_rn(static_cast<float>(exact)).x;
    else
      rounded = __float2half_rn(static_cast<float>(exact)).x;
    if (number_of(rounded, X()) != exact) on_host::fail("an inexact fma");
    out |= static_cast<uint32_t>(rounded) << shift;
  }
  return out;
}

inline void let_dependents_start() {}
inline void wait_for_earlier_kernel() {}

}  // namespace qk::cuda
