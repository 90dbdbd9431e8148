// The CPU kernels: every kernel once per ISA, the choice of an ISA, and how calls are divided among threads.
//
// A kernel processes the half-open range [begin, end) of a call's units; threads get ranges. How a call divides into
// units depends on its shape alone, so results are the same bits for any number of threads.
#pragma once

#include <string>

#include "../common/call.h"
#include "lowbit_plan.h"

namespace qk {

constexpr int64_t kUnitElements = 16384;  // about what stays in the first two cache levels
constexpr int64_t kUnitRows = 1024;       // at most in a unit: the noise of their scales is drawn in one span
constexpr int64_t kNoiseSpan = 1024;      // elements whose noise is drawn together; a multiple of 64

// The units of a weight: several short rows, or a piece of a long row.
struct Units {
  int64_t rows, cols, rows_per_unit, pieces_per_row;

  Units(int64_t rows_, int64_t cols_) : rows(rows_), cols(cols_) {
    rows_per_unit = cols >= kUnitElements ? 1 : kUnitElements / (cols > 0 ? cols : 1);
    if (rows_per_unit > kUnitRows) rows_per_unit = kUnitRows;
    pieces_per_row = cols > kUnitElements ? (cols + kUnitElements - 1) / kUnitElements : 1;
  }
  int64_t count() const { return (rows + rows_per_unit - 1) / rows_per_unit * pieces_per_row; }
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

// The tokens [first, last) of an expert; only experts that have tokens get one of these.
struct Expert {
  int64_t index, first, last;
};

// Every kernel and its parameters; a line here declares the kernel in each of the ISAs. What a unit is:
//
//   forward, backward, jvp, quantize,     Units of a weight. `partial` is 2 * rows * pieces_per_row doubles, for sums
//   dequantize, reset                     of rows that are cut into pieces; finish_backward adds these in order
//   dynamic, cross_entropy*               a row
//   normal                                kNoiseSpan elements
//   pack, unpack, dequantize_packed       a row, counted over all experts
//   lowbit_prepare, lowbit_multiply       a token; a panel of the weight, one expert after another. See lowbit_plan.h
//   gram_schmidt                          KrylovUnits; leaves rows + 1 partial sums for each unit
//   perturb, perturbation_norms           kUnitElements elements; the latter leaves two partial sums for each unit
#define QK_KERNELS(KERNEL)                                                                              \
  KERNEL(forward, (const FakeQuantizeCall&, int64_t begin, int64_t end))                                \
  KERNEL(backward, (const FakeQuantizeBackwardCall&, double* partial, int64_t begin, int64_t end))      \
  KERNEL(finish_backward, (const FakeQuantizeBackwardCall&, const double* partial))                     \
  KERNEL(jvp, (const FakeQuantizeJvpCall&, int64_t begin, int64_t end))                                 \
  KERNEL(quantize, (const QuantizeCall&, int64_t begin, int64_t end))                                   \
  KERNEL(dequantize, (const DequantizeCall&, int64_t begin, int64_t end))                               \
  KERNEL(dynamic, (const FakeQuantizeDynamicCall&, int64_t begin, int64_t end))                         \
  KERNEL(normal, (const NormalCall&, int64_t begin, int64_t end))                                       \
  KERNEL(pack, (const PackCall&, int64_t begin, int64_t end))                                           \
  KERNEL(unpack, (const UnpackCall&, int64_t begin, int64_t end))                                       \
  KERNEL(dequantize_packed, (const LowbitLinearCall&, void* out, DType, int64_t begin, int64_t end))    \
  KERNEL(lowbit_prepare, (const LowbitPlan&, void* buffer, int64_t begin, int64_t end))                 \
  KERNEL(lowbit_multiply, (const LowbitPlan&, void* buffer, const Expert*, int64_t begin, int64_t end)) \
  KERNEL(gram_schmidt, (const GramSchmidtCall&, double* partial, int64_t begin, int64_t end))           \
  KERNEL(cross_entropy, (const CrossEntropyCall&, int64_t begin, int64_t end))                          \
  KERNEL(cross_entropy_backward, (const CrossEntropyCall&, int64_t begin, int64_t end))                 \
  KERNEL(cross_entropy_hvp, (const CrossEntropyCall&, int64_t begin, int64_t end))                      \
  KERNEL(reset, (const ResetCall&, int64_t begin, int64_t end))                                         \
  KERNEL(perturb, (const PerturbCall&, int64_t begin, int64_t end))                                     \
  KERNEL(perturbation_norms, (const PerturbationNormsCall&, double* partial, int64_t begin, int64_t end))

struct Kernels {
  const char* isa;
#define QK_MEMBER(name, arguments) void(*name) arguments;
  QK_KERNELS(QK_MEMBER)
#undef QK_MEMBER
  LowbitPlan (*lowbit_plan)(const LowbitLinearCall&);
};

// The kernels of the widest ISA that this machine has and that ATEN_CPU_CAPABILITY (default, avx2, avx512) allows;
// unset, it allows all. QATKERNELS_ISA names one instead, and throws if this machine or this build does not have it.
// Chosen at the first call.
const Kernels& kernels();

// For tests: from now on kernels() are those of a named ISA; returns the name of the former one. Calls that run
// meanwhile may use kernels of both. Throws std::invalid_argument if this machine or this build does not have it.
const char* use_isa(const std::string& name);

// Names of the ISAs that were compiled, widest last, and whether this machine runs one.
const char* compiled_isas();
bool has_isa(const char* name);

}  // namespace qk
