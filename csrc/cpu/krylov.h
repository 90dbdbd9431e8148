// One pass of Gram-Schmidt on the CPU. begin and end count KrylovUnits.
#pragma once

#include "../common/dtype.h"
#include "isa_kernel.h"

namespace qk {

// w_new = w - basis^T h, dots = basis w_new, sq = w_new . w_new.
struct GramSchmidtCall {
  const void *basis, *w;
  const double* h;  // [rows]; null: w_new is w
  void* w_new;      // may be w
  double *dots, *sq;
  int64_t rows, cols;
  DType basis_type, w_type;  // f32, bf16 or f64; f32 or f64
};

// The units of a basis: columns in blocks, two of which stay in the second cache level while all rows are read, and
// several blocks to a unit where there are many.
struct KrylovUnits {
  int64_t cols, block, blocks_per_unit;

  KrylovUnits(int64_t rows, int64_t cols_, int64_t element_bytes) : cols(cols_), block(2048) {
    while (block > 256 && block * rows * element_bytes > 256 * 1024) block /= 2;
    blocks_per_unit = (blocks() + kMaxUnits - 1) / kMaxUnits;
    if (blocks_per_unit < 1) blocks_per_unit = 1;
  }
  int64_t blocks() const { return (cols + block - 1) / block; }
  int64_t count() const { return (blocks() + blocks_per_unit - 1) / blocks_per_unit; }

 private:
  static constexpr int64_t kMaxUnits = 256;  // the partial sums of units are added one after the other
};

// Leaves rows + 1 partial sums for each unit.
QK_ISA_KERNEL(gram_schmidt, void(const GramSchmidtCall&, double* partial, int64_t begin, int64_t end));

}  // namespace qk
