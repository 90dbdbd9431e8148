// What calls of ops on a weight have in common.
#pragma once

#include "dtype.h"
#include "grid.h"

namespace qk {

// The weight as rows that share a scale each, its scales, grid and noise.
struct QuantArgs {
  const void* w;
  const void* scale;       // [rows]
  const void* zero_point;  // [rows]
  const int64_t* seed;     // one element; null without noise
  int64_t rows, cols;
  DType w_type, scale_type;
  Grid<double> grid;
  double noise_std, scale_noise_std, grad_scale;
};

}  // namespace qk
