// The CPU kernels, compiled once per ISA, and the one choice between them.
//
// A kernel works through the half-open range [begin, end) of its units; how a call divides into units depends on its
// shape alone, never on the number of threads, so results are the same bits whatever the pool does.
#pragma once

#include <string>

#include "../common/call.h"

namespace qk {

constexpr int64_t kUnitElements = 16384;  // about what stays in the first two cache levels
constexpr int64_t kUnitRows = 1024;       // at most, so that the noise of their scales is drawn at once

// Short rows are bundled, long rows are cut.
struct Units {
  int64_t rows, cols, rows_per_unit, pieces_per_row;

  Units(int64_t rows_, int64_t cols_) : rows(rows_), cols(cols_) {
    rows_per_unit = cols >= kUnitElements ? 1 : kUnitElements / (cols > 0 ? cols : 1);
    if (rows_per_unit > kUnitRows) rows_per_unit = kUnitRows;
    pieces_per_row = cols > kUnitElements ? (cols + kUnitElements - 1) / kUnitElements : 1;
  }
  int64_t count() const { return (rows + rows_per_unit - 1) / rows_per_unit * pieces_per_row; }
};

// An expert that has tokens: first ... last - 1.
struct Expert {
  int64_t index, first, last;
};
constexpr int64_t kPanel = 32;  // rows of a weight that are multiplied together

// Every kernel: its name and what it takes. A line here is a kernel in each of the ISAs.
//
// partial: 2 * rows * pieces_per_row doubles, used where rows are cut; finish_backward then adds them in order.
// dynamic's and cross_entropy's units are rows, normal's kNoiseSpan elements. gram_schmidt leaves rows + 1 partial sums
// for each unit. The units of pack, unpack and dequantize_packed are rows (of all experts), those of lowbit_prepare
// tokens, and those of lowbit_multiply the panels of one expert after another.
#define QK_KERNELS(KERNEL)                                                                                    \
  KERNEL(forward, (const FakeQuantizeCall&, int64_t begin, int64_t end))                                      \
  KERNEL(backward, (const FakeQuantizeBackwardCall&, double* partial, int64_t begin, int64_t end))            \
  KERNEL(finish_backward, (const FakeQuantizeBackwardCall&, const double* partial))                           \
  KERNEL(jvp, (const FakeQuantizeJvpCall&, int64_t begin, int64_t end))                                       \
  KERNEL(quantize, (const QuantizeCall&, int64_t begin, int64_t end))                                         \
  KERNEL(dequantize, (const DequantizeCall&, int64_t begin, int64_t end))                                     \
  KERNEL(dynamic, (const FakeQuantizeDynamicCall&, int64_t begin, int64_t end))                               \
  KERNEL(normal, (const NormalCall&, int64_t begin, int64_t end))                                             \
  KERNEL(pack, (const PackCall&, int64_t begin, int64_t end))                                                 \
  KERNEL(unpack, (const UnpackCall&, int64_t begin, int64_t end))                                             \
  KERNEL(dequantize_packed, (const LowbitLinearCall&, void* out, DType, int64_t begin, int64_t end))          \
  KERNEL(lowbit_prepare, (const LowbitLinearCall&, void* memory, int64_t begin, int64_t end))                 \
  KERNEL(lowbit_multiply, (const LowbitLinearCall&, void* memory, const Expert*, int64_t begin, int64_t end)) \
  KERNEL(gram_schmidt, (const GramSchmidtCall&, double* partial, int64_t begin, int64_t end))                 \
  KERNEL(cross_entropy, (const CrossEntropyCall&, int64_t begin, int64_t end))                                \
  KERNEL(cross_entropy_backward, (const CrossEntropyCall&, int64_t begin, int64_t end))                       \
  KERNEL(cross_entropy_hvp, (const CrossEntropyCall&, int64_t begin, int64_t end))                            \
  KERNEL(reset, (const ResetCall&, int64_t begin, int64_t end))                                               \
  KERNEL(perturb, (const PerturbCall&, int64_t begin, int64_t end))                                           \
  KERNEL(perturbation_norms, (const PerturbationNormsCall&, double* partial, int64_t begin, int64_t end))

// Columns of a basis in blocks, two of which stay in the second cache level while all rows pass; and these in units.
struct KrylovUnits {
  int64_t cols, block, blocks_per_unit;

  KrylovUnits(int64_t rows, int64_t cols_, int64_t element_bytes) : cols(cols_), block(2048) {
    while (block > 256 && block * rows * element_bytes > 256 * 1024) block /= 2;
    blocks_per_unit = (blocks() + kMost - 1) / kMost;
    if (blocks_per_unit < 1) blocks_per_unit = 1;
  }
  int64_t blocks() const { return (cols + block - 1) / block; }
  int64_t count() const { return (blocks() + blocks_per_unit - 1) / blocks_per_unit; }

 private:
  static constexpr int64_t kMost = 256;  // of them: their partial sums are added one after the other
};

struct Kernels {
  const char* isa;
#define QK_MEMBER(name, arguments) void(*name) arguments;
  QK_KERNELS(QK_MEMBER)
#undef QK_MEMBER
  int64_t (*lowbit_memory)(const LowbitLinearCall&);  // bytes that lowbit_prepare fills for lowbit_multiply
};

constexpr int64_t kNoiseSpan = 1024;  // elements drawn at once, a multiple of 64

// The kernels for this machine: of the widest ISA that it has and ATEN_CPU_CAPABILITY (default, avx2, avx512) allows;
// unset, it allows all. QATKERNELS_ISA names one instead; one that is not there throws.
const Kernels& kernels();

// For tests: from now on kernels() are those of a named ISA; returns the name of the former one. Calls that run
// meanwhile may use kernels of both. Throws std::invalid_argument if this machine or this build does not have it.
const char* use_isa(const std::string& name);

// Names of the ISAs that were compiled, widest last, and whether this machine runs one.
const char* compiled_isas();
bool has_isa(const char* name);

}  // namespace qk
