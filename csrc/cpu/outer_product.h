// The gradient of a quantized weight on machines with AMX: the product G^T X of bfloat16 matrices that have a row for
// each token, by tiles (tiles.h), and the backward of the quantization, of which each part of the product is the input
// while it is in the caches.
//
//   outer_prepare    on all threads   tiles of G, in a buffer that the threads share
//   outer_multiply   on all threads   G x panels of X -> dw, and parts of ds and dz
//   outer_finish     once             these parts -> ds and dz
#pragma once

#include <cstdint>

#include "../common/fake_quantize.h"
#include "isa_kernel.h"

namespace qk {

constexpr int64_t kOuterTokens = 256;  // tokens that are a unit of prepare
// Rows and columns of the weight that are a unit of multiply.
constexpr int64_t kOuterRows = 256, kOuterCols = 1024;

struct OuterProduct {
  FakeQuantizeBackwardCall backward;  // of a weight without noise; its g is not used
  const uint16_t *g, *x;              // bfloat16, [tokens, rows] and [tokens, cols]
  int64_t tokens, rows, cols;         // of the weight

  int64_t parts() const { return (cols + kOuterCols - 1) / kOuterCols; }  // of a row
  int64_t units() const { return (rows + kOuterRows - 1) / kOuterRows * parts(); }
};

// The functions of one ISA and kind of tiles. A call takes them once, and stays whole if the ISA is changed meanwhile.
struct OuterKernel {
  // Bytes of the buffer, which is aligned to 64.
  int64_t (*buffer_bytes)(const OuterProduct&);
  // begin and end count blocks of kOuterTokens.
  void (*prepare)(const OuterProduct&, char* buffer, int64_t begin, int64_t end);
  // begin and end count units. partial: [rows, parts, 2], for scales of which a unit has a part.
  void (*multiply)(const OuterProduct&, const char* buffer, double* partial, int64_t begin, int64_t end);
  void (*finish)(const OuterProduct&, const double* partial);
};

// Null if this machine and build have no tiles, or there is noise, or scales divide the weight otherwise than units.
QK_PRODUCT_KERNEL(outer_kernel, const OuterKernel*(const OuterProduct&));

}  // namespace qk
