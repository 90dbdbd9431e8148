// What the two decode kernels share: how weights come into shared memory, which rows and columns a warp multiplies, and
// how the sums of warps become outputs.
//
// A warp has a ring of kSlots stages in shared memory. All but one of them are on their way while it multiplies one.
#pragma once

#include <atomic>
#include <utility>

#include "launch.h"
#include "lowbit_gemv.h"
#include "ptx.h"

namespace qk::cuda {

// Calls f(0), f(1), ... with compile-time constants.
template <class F, int... I>
__device__ __forceinline__ void each(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// What a warp multiplies: stages [first, end) of the sixteen rows from first_row(round) on, in each of its rounds.
struct WarpShare {
  int chunk, block, chunk_first, chunk_stages, first, end, tiles, tile;

  __device__ __forceinline__ WarpShare(const LowbitGemv& p, int warp) {
    chunk = static_cast<int>(blockIdx.x) % p.chunks;
    block = static_cast<int>(blockIdx.x) / p.chunks;
    chunk_first = chunk * p.chunk_stages;
    chunk_stages = min(p.chunk_stages, p.stages - chunk_first);
    const int part = warp % p.warps_per_row;
    tiles = kGemvWarps / p.warps_per_row;
    tile = warp / p.warps_per_row;
    first = chunk_first + chunk_stages * part / p.warps_per_row;
    end = chunk_first + chunk_stages * (part + 1) / p.warps_per_row;
  }
  __device__ __forceinline__ int64_t first_row(int round) const { return (int64_t{round} * tiles + tile) * kTileRows; }
};

// The ring of kSlots stages that a warp has in shared memory, and the stage that is fetched next.
template <int Bits>
struct StageRing {
  static constexpr LowbitLayout kLayout{Bits};
  static constexpr int kChunks = kTileRows * kLayout.stage_chunks, kCopies = (kChunks + kWarp - 1) / kWarp;
  uint8_t* slots;
  int next_round, next_stage, next_slot;
  const uint8_t* from[kCopies];  // what this lane copies of stage 0: 16 bytes each

  __device__ __forceinline__ StageRing(const LowbitGemv& p, const WarpShare& share, uint8_t* slots_)
      : slots(slots_),
        next_round(share.first < share.end ? share.block : p.rounds),
        next_stage(share.first),
        next_slot(0) {
    start_round(p, share);
  }
  // The i-th chunk of 16 bytes that this lane copies.
  __device__ __forceinline__ static int chunk_of_lane(int i) {
    return static_cast<int>(threadIdx.x) % kWarp + i * kWarp;
  }
  __device__ __forceinline__ void start_round(const LowbitGemv& p, const WarpShare& share) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = chunk_of_lane(i) / kLayout.stage_chunks, chunk = chunk_of_lane(i) % kLayout.stage_chunks;
      from[i] = p.packed + min(share.first_row(next_round) + row, p.rows - 1) * p.row_bytes + chunk * 16;
    }
  }
  // Starts the copies of the next stage, if there is one.
  __device__ __forceinline__ void fetch(const LowbitGemv& p, const WarpShare& share, int slot_bytes) {
    if (next_round < p.rounds) {
      const int64_t offset = int64_t{next_stage} * kLayout.stage_bytes;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (kChunks % kWarp != 0 && chunk_of_lane(i) >= kChunks) break;
        const int row = chunk_of_lane(i) / kLayout.stage_chunks, chunk = chunk_of_lane(i) % kLayout.stage_chunks;
        copy_chunk(p, slots + next_slot * slot_bytes + row * kLayout.pitch + chunk * 16, from[i] + offset,
                   p.row_bytes - offset - chunk * 16);
      }
      next_slot = next_slot + 1 == kSlots ? 0 : next_slot + 1;
      if (++next_stage == share.end) {
        next_stage = share.first;
        next_round += p.row_blocks;
        start_round(p, share);
      }
    }
    copy_commit();
  }
  // Copies 16 bytes, of which `left` are in the row. Nothing beyond the end of a row is read; it becomes 0.
  __device__ __forceinline__ static void copy_chunk(const LowbitGemv& p, uint8_t* to, const uint8_t* source,
                                                    int64_t left) {
    if (left <= 0) source = p.packed;
    if (p.copy == 16) {
      copy_16_async(to, source, left > 0 ? 16 : 0);
      return;
    }
    if (p.copy == 4) {
#pragma unroll
      for (int w = 0; w < 16; w += 4) copy_4_async(to + w, left > w ? source + w : source, left > w ? 4 : 0);
      return;
    }
#pragma unroll 1
    for (int w = 0; w < 16; w += 4) {
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (left > w + j) word |= static_cast<uint32_t>(__ldg(source + w + j)) << 8 * j;
      *reinterpret_cast<uint32_t*>(to + w) = word;
    }
  }
};

// The group that a stage begins in, and the granules to its end. Unused where groups are smaller than granules.
struct GroupPosition {
  int group = 0, left = 0;

  __device__ __forceinline__ GroupPosition(const LowbitGemv& p, const WarpShare& share, int granules) {
    if (p.group_granules == 0 || share.first >= share.end) return;
    group = share.first * granules / p.group_granules;
    left = p.group_granules - share.first * granules % p.group_granules;
  }
};

// Adds the sums of the warps that share rows, in a fixed order, and writes the outputs of a round of rows.
// Outputs of a token are multiplied with its unit.
template <int Tiles>
__device__ __forceinline__ void write_round(const LowbitGemv& p, const float (&totals)[Tiles][4], const float* unit,
                                            float* partial, int chunk, int round) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, g = thread % kWarp / 4, t = thread % 4;
  const int tiles = kGemvWarps / p.warps_per_row, copies = p.group_granules == 0 ? 4 : 1;
  // [warp][row][activation row]
  float* const own = partial + warp * kTileRows * 8 * Tiles;
#pragma unroll
  for (int n = 0; n < Tiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) own[(g + i / 2 * 8) * 8 * Tiles + 8 * n + 2 * t + i % 2] = totals[n][i];
  __syncthreads();
  // Each output is added up by warps_per_row neighbouring threads of a warp.
  for (int i = thread; i < tiles * kTileRows * p.tokens * p.warps_per_row; i += kGemvThreads) {
    const int from_part = i % p.warps_per_row, output = i / p.warps_per_row;
    const int row = output % kTileRows, token = output / kTileRows % p.tokens, tile = output / kTileRows / p.tokens;
    const float* const act_rows =
        partial + ((tile * p.warps_per_row + from_part) * kTileRows + row) * 8 * Tiles + token * p.limbs * copies;
    float sum = 0;
    for (int d = p.limbs - 1; d >= 0; --d) {
      float limb = 0;
      for (int k = 0; k < copies; ++k) limb += act_rows[d * copies + k];
      sum = fmaf(sum, 256.0f, limb);
    }
    for (int offset = p.warps_per_row / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
    const int64_t r = (int64_t{round} * tiles + tile) * kTileRows + row;
    if (from_part != 0 || r >= p.rows) continue;
    sum *= unit[token];
    if (p.partial)
      p.partial[(int64_t{chunk} * p.tokens + token) * p.rows + r] = sum;
    else
      p.write(token, r, sum);
  }
}

// What is done once for each kernel and device: allow the shared memory, and find out whether a launch may be dependent
// there, which it may if the code was compiled with the instruction that waits.
class PreparedKernel {
 public:
  template <class Parameters>
  cudaError_t prepare(void (*kernel)(Parameters), const DeviceLimits& device) {
    const uint64_t bit = bit_of(device);
    if (prepared_ & bit) return cudaSuccess;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared);
    if (error != cudaSuccess) return error;
    if (attributes.ptxVersion >= 90) dependent_ |= bit;
    prepared_ |= bit;
    return cudaSuccess;
  }
  bool dependent(const DeviceLimits& device) const { return dependent_ & bit_of(device); }

 private:
  // 0 for devices that are prepared before every launch.
  static uint64_t bit_of(const DeviceLimits& device) { return device.id < 64 ? uint64_t{1} << device.id : 0; }

  std::atomic<uint64_t> prepared_{0}, dependent_{0};
};

}  // namespace qk::cuda
