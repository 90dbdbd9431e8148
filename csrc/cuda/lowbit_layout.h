// How packed codes become operands of int8 tensor-core products.
//
// The dimension that is summed over may be permuted if both operands are. So codes are taken in the order in which
// decoding costs the fewest instructions, and x is permuted to match once. A product of 32 columns (ptx.h) takes two
// registers of four codes from each of the four lanes t that share a row of the weight.
//
//   granule  the fewest columns from which the four lanes get whole words. Bits that divide 8: word t of 16 bytes
//   belongs
//            to lane t (twice that for 8 bits). 3, 5, 6, 7 bits: 32 codes are `bits` words, and lane t has the t-th 32
//            codes.
//   stage    the columns that a warp copies to shared memory at a time, of each of sixteen rows.
//
// A code is decoded to a byte: its bits at the top, the top bit flipped, and a constant below. That takes a shift, a
// mask and an exclusive or, the latter two as one instruction, for four codes. The byte is 2^(8 - bits) * (code -
// 2^(bits - 1)) plus the constant, for codes counted from 0. For binary, SEQ (to 7 bits) and LSQ grids that is the
// value itself times a power of two.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/grid.h"

namespace qk::cuda {

struct LowbitLayout {
  int bits;
  bool whole;  // no code crosses a byte
  int stage_chunks, stage_bytes, stage_cols, products, granule_cols, granules, lane_cols, granule_words, pitch;

  QK_HOST_DEVICE constexpr explicit LowbitLayout(int b)
      : bits(b),
        whole(8 % b == 0),
        stage_chunks(whole ? 4 : b),  // of 16 bytes
        stage_bytes(16 * stage_chunks),
        stage_cols(stage_bytes * 8 / b),
        products(stage_cols / 32),
        granule_cols(b == 8  ? 32
                     : whole ? 128 / b
                             : 128),
        granules(stage_cols / granule_cols),
        lane_cols(granule_cols / 4),
        granule_words(b == 8  ? 2
                      : whole ? 1
                              : b),
        // Between rows in shared memory: such that eight rows times four lanes read 32 different banks (16 for 6 bits).
        pitch(stage_bytes + (whole ? 16 : 0)) {}

  // The index, within a row's stage, of the i-th word of a lane.
  QK_HOST_DEVICE constexpr int word(int granule, int lane, int i) const {
    return whole ? 4 * (granule * granule_words + i) + lane : lane * bits + i;
  }
  // The column, within a granule, of byte j of register r of a lane.
  QK_HOST_DEVICE constexpr int col(int lane, int r, int j) const {
    if (bits == 8) return 16 * r + 4 * lane + j;
    return whole ? lane * lane_cols + 8 * j / bits + r : lane * lane_cols + 8 * j + r;
  }
};

// The top `bits` bits of every byte.
__host__ __device__ constexpr uint32_t top_bits(int bits) { return (0xFF00u >> bits & 0xFF) * 0x01010101u; }

template <int S>
__device__ __forceinline__ uint32_t shifted_left(uint32_t w) {
  if constexpr (S >= 0)
    return w << S;
  else
    return w >> -S;
}

// Decodes the words of a lane to registers of four bytes. `flip` has, in every byte, the flipped top bit and the
// constant described above.
template <int Bits>
struct Decoder {
  static constexpr LowbitLayout kLayout{Bits};
  static constexpr int kWords = kLayout.granule_words, kRegisters = kLayout.granule_cols / 16;
  uint32_t part[kWords];  // whole bytes: the words. Otherwise byte j of part k is byte k + j * bits of the words.

  __device__ __forceinline__ explicit Decoder(const uint32_t (&words)[kWords]) {
    if constexpr (kLayout.whole) {
#pragma unroll
      for (int k = 0; k < kWords; ++k) part[k] = words[k];
    } else {
#pragma unroll
      for (int k = 0; k < Bits; ++k) {
        const int b0 = k, b1 = k + Bits, b2 = k + 2 * Bits, b3 = k + 3 * Bits;
        const uint32_t low = __byte_perm(words[b0 / 4], words[b1 / 4], b0 % 4 | (4 + b1 % 4) << 4);
        const uint32_t high = __byte_perm(words[b2 / 4], words[b3 / 4], b2 % 4 | (4 + b3 % 4) << 4);
        part[k] = __byte_perm(low, high, 0x5410);
      }
    }
  }

  template <int R>
  __device__ __forceinline__ uint32_t get(uint32_t flip) const {
    constexpr int kFirst = Bits == 8 ? 8 * R : R * Bits, kPart = kFirst / 8, kOffset = kFirst % 8;
    constexpr int kEnd = kOffset + Bits;  // beyond 8: the rest is in the low bits of the next part
    if constexpr (kEnd <= 8) {
      return (shifted_left<8 - kEnd>(part[kPart]) & top_bits(Bits)) ^ flip;
    } else {
      constexpr uint32_t kHigh = top_bits(kEnd - 8), kLow = top_bits(Bits) & ~kHigh;
      return (shifted_left<16 - kEnd>(part[kPart + 1]) & kHigh) ^ ((shifted_left<8 - kEnd>(part[kPart]) & kLow) ^ flip);
    }
  }
};

}  // namespace qk::cuda
