// What tests set of the device that kernels run on, and parts of kernels by themselves: the division of rows and of
// numbers.
#include "cuda/divide.h"
#include "cuda/tile.h"

extern "C" {

void set_reversed(bool reversed) { on_host::reversed = reversed; }
void set_device(int multiprocessors, int shared) {
  on_host::multiprocessors = multiprocessors;
  on_host::most_shared = shared;
}

void layout(int64_t rows, int64_t cols, int v, int u, int64_t* out) {
  const qk::cuda::TileLayout layout(rows, cols, v, u, true);
  out[0] = layout.pieces;
  out[1] = layout.piece_cols;
}

void divide(const float* a, const float* b, float* q, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float numerator[1] = {a[i]};
    float quotient[1];
    qk::cuda::Divisor<float>(b[i]).divide<true>(numerator, quotient);
    q[i] = quotient[0];
  }
}
}
