// Products with packed weights: the ways to multiply, and how each wants the activations.
//
// float32 runs on any ISA, from codes turned into numbers (lowbit_float.cpp). The other paths work on sixteen rows at
// once, a row to a 32-bit lane: sixteen times 64 bytes of codes are transposed in registers, and each lane then holds a
// word with 32 / bits codes of its row. Shifting the word puts its codes into place, a pair or four of them after
// another; the order in which they come is a permutation within the word, and it is the activations that are permuted
// to match, once. Codes of 3, 5, 6 and 7 bits are expanded to bytes on the way.
//
//   pairs    bfloat16 activations times codes as bfloat16, which is exact; sums in float32
//   fours    int8 times codes, sums in int32. With act_bits a token is one line of int8. Without, it is three: its
//            numbers to 24 bits below its largest, as digits to the base 256. That is what float32 sums keep of them,
//            at the price of one and a half products of bfloat16 instead of a product of float32
//   tables   no products: sums of few activations looked up by the codes (lowbit_table.cpp), for 1 and 2 bits
#pragma once

#include "kernels.h"
#include "packing.h"

namespace qk {
namespace QK_ISA {

enum class Path { kFloat, kPairs, kFours, kTables };

// Whole numbers of up to kLargest in three digits to the base 256, each from -128 to 127, the lowest first.
constexpr float kLargest = 8355711;  // 127 + 127 * 256 + 127 * 65536
constexpr int64_t kDigits = 3;

// Codes in a 32-bit word of a row, and in the 64 bytes that are transposed together.
constexpr int64_t word_codes(int bits) { return bits == 1 || bits == 2 || bits == 4 ? 32 / bits : 4; }
constexpr int64_t chunk_codes(int bits) { return 16 * word_codes(bits); }

constexpr int64_t kWordTables = 2 * kDigits * 64;  // bytes of the tables that a word looks up in
constexpr int64_t kTablePanels = 2;                // that look up together: an entry is loaded once for their rows
constexpr int64_t kFloatPanels = 8;                // whose float32 sums are formed together, where there are many lines
constexpr int64_t kFloatLines = 264;  // of a block then: 256 columns of them stay in the second cache level

// The activations of a call, prepared, in memory that the caller provides.
struct Activations {
  Path path;
  int64_t padded;  // columns, a multiple of the chunk; what is added is zero
  int64_t line_bytes;
  int64_t digits;  // lines of a token
  bool by_chunk;   // whether lines are laid out for rows of words, instead of columns of them
  char* x;         // [lines, stride()]
  float* sums;     // [lines, groups] sums over groups, or null where nothing needs them
  float* scales;   // [tokens] what their lines are to be multiplied with, or null
  float* units;    // [lines, groups] what the integers in tables count, or null
  int64_t bytes;   // of the memory

  Activations(const LowbitLinearCall& call, void* memory);
  // Between lines, in bytes: never a power of two, which would send them all to the same few lines of the cache.
  int64_t stride() const { return line_bytes + 64; }
  const char* line(int64_t i) const { return x + i * stride(); }
};

// Some rows of one expert times lines of its tokens.
struct RowBlock {
  const LowbitLinearCall& call;
  const Activations& activations;
  int64_t first_line, lines;
  int64_t first_row, rows;  // counted over all experts; at most kPanel, or several panels for tables and float32
  int64_t first_feature;    // of the output
};

// Write a line from the padded columns of a token, which are bfloat16 or int8 in value.
void write_pairs(const float* x, const Activations& to, int bits, char* line);
void write_fours(const float* x, const Activations& to, int bits, char* line);
// Write sums[line * kPanel + row] of the block, without bias and the scales of tokens.
void multiply_float(const RowBlock& block, float* sums, void* scratch);
void multiply_pairs(const RowBlock& block, float* sums, void* scratch);
void multiply_fours(const RowBlock& block, float* sums, void* scratch);
// The same from sums in tables; the sums of a panel follow all those of the one before.
void write_tables(const LowbitLinearCall& call, const float* x, const Activations& to, char* line, float* units);
void multiply_tables(const RowBlock& block, float* sums, void* scratch);
int64_t scratch_bytes(const LowbitLinearCall& call);

}  // namespace QK_ISA
}  // namespace qk
