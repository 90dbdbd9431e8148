// Products L^T R of bfloat16 matrices that have a row for each token, by tiles (tiles.h): the gradient of a weight on
// machines with AMX.
//
//   outer_prepare    on all threads   tiles of L, in a buffer that the threads share
//   outer_multiply   on all threads   L x panels of R -> out
#pragma once

#include <cstdint>

#include "isa_kernel.h"

namespace qk {

constexpr int64_t kOuterPanel = 32;    // columns of the result that are a unit of outer_multiply
constexpr int64_t kOuterTokens = 256;  // tokens that are a unit of outer_prepare

struct OuterProduct {
  const uint16_t *left, *right;  // bfloat16, [tokens, rows] and [tokens, cols]
  uint16_t* out;                 // bfloat16, [rows, cols]
  int64_t tokens, rows, cols;
};

// Whether this machine and build have tiles.
QK_PRODUCT_KERNEL(outer_serves, bool());
// Bytes of the buffer, which is aligned to 64.
QK_PRODUCT_KERNEL(outer_buffer_bytes, int64_t(const OuterProduct&));
QK_PRODUCT_KERNEL(outer_prepare, void(const OuterProduct&, char* buffer, int64_t begin, int64_t end));
QK_PRODUCT_KERNEL(outer_multiply, void(const OuterProduct&, const char* buffer, int64_t begin, int64_t end));

}  // namespace qk
