// How the rows of a tensor are divided among threads.
//
// `lanes` neighbouring threads share a row, and a thread loads V neighbouring elements (a vector) at a time.
//
//   short tile  a row of at most 32 vectors: one for each lane. A thread has vectors of U rows in flight.
//   long tile   a longer row: a warp or a block walks along it. A thread has U vectors of the row in flight.
//
// Long rows are cut into pieces, a block each, where rows are too few to fill a device, or so long that a thread would
// add many numbers one after the other. The division depends only on the shape and on whether vectors are possible, so
// sums have the same bits on every device.
#pragma once

#include <algorithm>

#include "launch.h"
#include "vector.h"

namespace qk::cuda {

struct TileLayout {
  static constexpr int64_t kEnoughBlocks = 2048;
  static constexpr int64_t kMaxSteps = 8;  // of a thread in a piece

  int64_t rows, cols, pieces, piece_cols;
  int lane_bits, rows_per_thread;
  bool is_long;

  TileLayout(int64_t rows_, int64_t cols_, int v, int u, bool cut)
      : rows(rows_), cols(cols_), pieces(1), piece_cols(cols_) {
    const int64_t vectors = (cols + v - 1) / v;
    is_long = vectors > kWarp;
    rows_per_thread = is_long ? 1 : u;
    lane_bits = vectors > 8 * kWarp ? 8 : 5;
    while (!is_long && lane_bits > 0 && vectors <= (1 << (lane_bits - 1))) --lane_bits;
    if (!cut || lane_bits < 8) return;
    const int64_t step = int64_t(kThreads) * u * v, steps = (cols + step - 1) / step;
    const int64_t piece_steps = std::clamp<int64_t>(rows * steps / kEnoughBlocks, 1, kMaxSteps);
    pieces = (steps + piece_steps - 1) / piece_steps;
    piece_cols = (steps + pieces - 1) / pieces * step;
  }

  int64_t blocks() const {
    const int64_t rows_per_block = int64_t(kThreads >> lane_bits) * rows_per_thread;
    return (rows + rows_per_block - 1) / rows_per_block * pieces;
  }
};
static_assert(kThreads == 1 << 8);

// A thread's share. In each step of for (col = begin; col < end; col += step) it has the vectors k = 0 ... U - 1 at
// index(col, k), in row(k), provided that holds(col, k). A short tile takes one step.
//
// Kernels read a step ahead of what they compute, and the first vectors before the scales: a thread with only one or
// two steps would not keep the memory busy otherwise.
template <int V, int U, bool Long>
struct Tile {
  static constexpr int kRows = Long ? 1 : U;

  int64_t rows, cols, first_row, begin, end, step, piece;
  int lane, lanes;

  __device__ explicit Tile(const TileLayout& layout) : rows(layout.rows), cols(layout.cols) {
    lanes = 1 << layout.lane_bits;
    lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    const int row_in_block = static_cast<int>(threadIdx.x) >> layout.lane_bits,
              block_rows = kThreads >> layout.lane_bits;
    if constexpr (Long) {
      const unsigned pieces = static_cast<unsigned>(layout.pieces);
      piece = blockIdx.x % pieces;
      first_row = int64_t(blockIdx.x / pieces) * block_rows + row_in_block;
      const int64_t piece_end = (piece + 1) * layout.piece_cols;
      begin = piece * layout.piece_cols + lane * V;
      end = first_row >= rows ? 0 : piece_end < cols ? piece_end : cols;
      step = int64_t(lanes) * V * U;
    } else {
      piece = 0;
      first_row = int64_t(blockIdx.x) * block_rows * U + row_in_block;
      begin = lane * V;
      end = cols;
      step = cols;
    }
  }

  // Always a row of the tensor, even where the thread holds nothing.
  __device__ int64_t row(int k) const {
    const int64_t r = unclamped_row(k);
    return r < rows ? r : rows - 1;
  }
  __device__ bool has_row(int k) const { return unclamped_row(k) < rows; }
  __device__ bool holds(int64_t col, int k) const { return Long ? col + k * lanes * V < end : col < end && has_row(k); }
  __device__ int64_t index(int64_t col, int k) const {
    return unclamped_row(k) * cols + col + (Long ? k * lanes * V : 0);
  }

  // Loads the vectors of one step.
  template <class T>
  __device__ __forceinline__ void read(const T* p, int64_t col, Vector<T, V> (&vectors)[U]) const {
#pragma unroll
    for (int k = 0; k < U; ++k)
      if (holds(col, k)) vectors[k] = load<V>(p + index(col, k));
  }

 private:
  __device__ int64_t unclamped_row(int k) const { return Long ? first_row : first_row + k * (kThreads / lanes); }
};

// Combines a value over the lanes that share a row, in a fixed order; every lane gets the same result. All threads of
// the block must call.
template <class T, class F>
__device__ __forceinline__ T over_lanes(T x, int lanes, F combine) {
  for (int offset = (lanes < kWarp ? lanes : kWarp) / 2; offset > 0; offset /= 2)
    x = combine(x, __shfl_xor_sync(0xFFFFFFFFu, x, offset));
  if (lanes > kWarp) {
    __shared__ T warps[kThreads / kWarp];
    __syncthreads();  // the array may still be read from the previous call
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = warps[0];
    for (int i = 1; i < kThreads / kWarp; ++i) x = combine(x, warps[i]);
  }
  return x;
}

}  // namespace qk::cuda
