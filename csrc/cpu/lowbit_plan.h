// The plan of a product with a packed weight on a CPU: which kernel multiplies, and where the buffer that the threads
// share holds the activations as that kernel wants them. It is made once for a call, from shapes and types alone.
//
//   lowbit_plan      once             call -> plan
//   lowbit_prepare   on all threads   tokens -> activation rows, in the buffer
//   lowbit_multiply  on all threads   activation rows x panels of weight rows -> y
//
// An activation row is a token, or one of the kLimbs limbs of a token whose values were split.
#pragma once

#include "../common/lowbit_linear.h"
#include "amx.h"

namespace qk {

constexpr int64_t kPanel = 32;  // rows of a weight that are multiplied together

// Integers of up to kLargestInteger are kLimbs limbs to the base 256, each from -128 to 127, the lowest first.
constexpr int64_t kLimbs = 3;
constexpr float kLimbWeights[kLimbs] = {1, 256, 65536};
constexpr float kLargestInteger = 8355711;  // 127 + 127 * 256 + 127 * 65536

struct LowbitKernel;

// The prepared activations: pointers into the buffer. What a plan does not need is null.
struct LowbitActivations {
  char* operands;
  int64_t stride;  // bytes that an activation row takes; between rows, except in the layout of lowbit_tiles.cpp
  float* sums;     // [activation rows, groups], over the columns of each group
  float* scales;   // [tokens], of the integers that the values were turned into
  float* units;    // [activation rows, groups], of the integers in lookup tables

  char* row(int64_t i) const { return operands + i * stride; }
};

struct LowbitPlan {
  LowbitLinearCall call;
  const LowbitKernel* kernel;

  // Set by the kernel.
  int64_t limbs;           // activation rows of a token: 1 or kLimbs
  int64_t padded_cols;     // columns of an activation row; those beyond call.cols are zero
  int64_t operand_bytes;   // of an activation row
  bool chunk_major;        // the order of operands (lowbit_words.h)
  bool has_sums;           // whether LowbitActivations has sums
  bool has_units;          // and units
  int64_t block_act_rows;  // activation rows whose sums are buffered at once, at most
  int64_t block_panels;    // panels that are multiplied at once, at most
  int64_t token_step;      // tokens that are prepared together, by one thread
  int64_t sum_rows;        // activation rows that a thread has sums for; block_act_rows if 0
  int64_t spare_bytes;     // of a thread, for prepare
  int64_t scratch_bytes;   // and for multiply
  cpu::Tiles tiles;        // for lowbit_tiles.cpp: the kind of tiles,
  int64_t tile_operands;   // and operands of one, 16 or 8

  // The layout of the buffer: what LowbitActivations points to, in bytes from its start.
  int64_t sums_at, scales_at, units_at, buffer_bytes;

  int64_t act_rows() const { return call.tokens * limbs; }
  bool has_scales() const { return limbs > 1 || call.act_bits; }
  // Never a power of two: activation rows would then all fall on the same few lines of the cache.
  int64_t stride() const { return operand_bytes + 64; }

  // The parts of a buffer that is aligned to 64 bytes.
  LowbitActivations activations(void* buffer) const {
    char* const start = static_cast<char*>(buffer);
    const auto at = [start](bool present, int64_t offset) {
      return present ? reinterpret_cast<float*>(start + offset) : nullptr;
    };
    return {start, stride(), at(has_sums, sums_at), at(has_scales(), scales_at), at(has_units, units_at)};
  }
};

// Some weight rows of one expert times some activation rows of its tokens.
struct LowbitBlock {
  const LowbitPlan& plan;
  const LowbitActivations& x;
  int64_t first_act_row, act_rows;
  int64_t first_row, rows;  // counted over all experts; at most plan.block_panels * kPanel
  int64_t first_feature;    // first_row counted in its expert
};

// A way to multiply. Functions of one ISA, which the plan keeps: a plan stays whole if the ISA is changed meanwhile.
struct LowbitKernel {
  bool (*serves)(const LowbitLinearCall& call);
  // Fills in what LowbitPlan says the kernel sets; it starts from zeros, and from one limb, panel and token_step.
  void (*plan)(LowbitPlan& plan);
  // Writes the activation rows of a token. x has its plan.padded_cols values, or the integers that they became, and may
  // be overwritten; spare has room for plan.spare_bytes.
  void (*prepare)(const LowbitPlan& plan, const LowbitActivations& to, int64_t token, float* x, float* spare);
  // Writes y of a block. sums has room for [block_panels, sum_rows, kPanel].
  void (*multiply)(const LowbitBlock& block, float* sums, void* scratch);
};

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace qk
