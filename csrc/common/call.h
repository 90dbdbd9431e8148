// The calls of kernels as plain data: the bindings fill them in, kernels of any device read them. No torch here.
//
// All pointers are to contiguous tensors on the kernel's device, of the shapes and dtypes that the op's fields say;
// null where an argument is absent. tests/cuda/on_host.py mirrors these structures.
#pragma once

#include <cstdint>

#include "grid.h"

namespace qk {

enum class DType : int32_t { f32, bf16, f16, f64 };

// The arguments that ops on a weight share: the weight as rows that share a scale each, its scales, grid and noise.
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

struct FakeQuantizeCall {
  QuantArgs args;
  void* y;
  DType y_type;
};

struct FakeQuantizeBackwardCall {
  QuantArgs args;
  const void* g;
  DType g_type;
  void *dw, *ds, *dz;  // of w's type and of scale's type; dz is null without a zero point
};

struct FakeQuantizeJvpCall {
  QuantArgs args;
  const void *tangent_w, *tangent_scale, *tangent_zero_point;  // each may be null
  void* y;
  DType y_type;
  void* value;  // of y's type: what FakeQuantizeCall computes; null if not wanted, and always on CUDA
};

struct QuantizeCall {
  QuantArgs args;
  void* codes;  // uint8 if code_max > 127, else int8
  int32_t code_min, code_max;
};

struct DequantizeCall {
  QuantArgs args;  // w is unused
  const void* codes;
  bool codes_unsigned;
  void* y;
  DType y_type;
};

struct ResetCall {
  QuantArgs args;
  void* w;  // args.w, writable: updated in place
  double quantized_weight;
};

struct PerturbCall {
  void *w, *g;
  const float* factor;
  int64_t numel;
  DType w_type, g_type;
  double eta;
  bool adaptive, swap;
};

struct PerturbationNormsCall {
  const void *g, *w;  // w is null unless the perturbation is adaptive
  int64_t numel;
  DType w_type, g_type;
  double eta;
};

struct FakeQuantizeDynamicCall {
  const void* x;
  void* y;
  int64_t rows, cols;
  DType type;
  int32_t bits;
};

// w_new = w - basis^T h, dots = basis w_new, sq = w_new . w_new.
struct GramSchmidtCall {
  const void *basis, *w;
  const double* h;  // [rows]; null: w_new is w
  void* w_new;      // may be w
  double *dots, *sq;
  int64_t rows, cols;
  DType basis_type, w_type;  // f32, bf16 or f64; f32 or f64
};

// Softmax cross-entropy of logits [rows, cols]. What has one value per row is float64 for float64 logits, else float32.
// Outputs may be null, and may be the logits or the tangent.
struct CrossEntropyCall {
  const void *logits, *tangent;
  const int64_t* targets;
  const void *lse, *g, *tangent_g;  // tangent_g may be null
  void *loss, *lse_out;             // forward
  void *grad, *tangent_grad, *tangent_loss;
  int64_t rows, cols, ignore_index;
  DType type;
};

struct NormalCall {
  const int64_t* seed;
  float* out;
  int64_t numel;
  uint32_t stream;
};

// Codes to their packed form and back. Rows are packed one by one, so that each starts at a byte.
struct PackCall {
  const void* codes;  // [rows, cols], int8 or uint8
  uint8_t* packed;    // [rows, row_bytes]
  int64_t rows, cols;
  int32_t code_min, bits;
};

struct UnpackCall {
  const uint8_t* packed;
  void* codes;
  int64_t rows, cols;
  int32_t code_min, bits;
};

// A product with packed weights, y = x W^T + bias. With offsets, tokens [offsets[e - 1], offsets[e]) belong to expert
// e.
struct LowbitLinearCall {
  const void* x;            // [tokens, cols]
  const uint8_t* packed;    // [experts, rows, row_bytes]
  const void* scale;        // [experts, rows, groups]
  const float* zero_point;  // like scale, or null
  const void* bias;         // [rows], or null
  const int32_t* offsets;   // [experts], or null for one expert
  void* y;                  // [tokens, rows]
  int64_t tokens, rows, cols, groups, experts;
  DType x_type, scale_type, bias_type;
  double steps, offset;              // value = (code + offset - zero) * (scale / steps)
  int32_t code_min, bits, act_bits;  // act_bits 0: x as it is
};

}  // namespace qk
