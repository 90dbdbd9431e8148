// Products with packed weights of 1 and 2 bits by table lookup: nothing is multiplied but the sums by the scales.
//
// Four bits of a weight row, a nibble, are the codes of four activations (of two at 2 bits), so their product has one
// of sixteen values. These are tabulated once for each token, and all weight rows look theirs up. A word of a weight
// row has eight nibbles; one instruction looks up four of them for sixteen rows:
//
//     vpermb index   a word of sixteen rows, the nibble of byte j plus 16 j   (low nibbles, then high nibbles)
//            table   64 bytes: entries 0 ... 15 of byte 0 | of byte 1 | of byte 2 | of byte 3
//
// An entry is an integer of 24 bits in a unit that is a power of two, as three limbs to the base 256, each with a table
// of its own; so all sums are sums of integers. Only entries are rounded, by at most 2^-23 of the largest entry: for K
// inputs no more than float32 sums lose (K / 2 times 2^-23), and nothing for bfloat16 activations within 2^-13 of the
// largest.
#include <cmath>

#include "lowbit_finish.h"
#include "lowbit_words.h"

namespace qk {
namespace QK_ISA {

#if defined(QK_LOWBIT_VNNI) && defined(__AVX512VBMI__)
namespace {

constexpr int64_t kBlockActRows = 528;          // activation rows whose sums for a panel are buffered, at most
constexpr int64_t kBlockPanels = 2;             // that look up together: an entry is loaded once for their rows
constexpr int64_t kVectors = kBlockPanels * 2;  // of sixteen rows, at most
constexpr int64_t kChunksAtOnce = 4;            // whose words are in the first cache level at once
constexpr int64_t kHalfBytes = kLimbs * 64;     // bytes of the tables for the low or the high nibbles of a word
constexpr int64_t kWordBytes = 2 * kHalfBytes;  // and for both
constexpr int64_t kMaxTableBytes = 4 << 20;     // for all tokens: the second cache level reads them for every block

int64_t table_bytes(const LowbitLinearCall& call) {
  return round_up(call.cols, chunk_codes(call.bits)) / word_codes(call.bits) * kWordBytes;
}

// Entries are scaled by the magnitude of the lowest code, which must be the largest of the grid (ternary has no code
// 3). At 2 bits an entry serves two activations only, and products of bfloat16 are as fast.
bool serves(const LowbitLinearCall& call) {
  const double low = call.code_min + call.offset;
  return has_whole_words(call) && !call.act_bits && !call.zero_point && low < 0 && -2 * low >= (1 << call.bits) - 2 &&
         (call.bits == 1 || (call.bits == 2 && call.x_type != DType::bf16)) &&
         call.tokens * table_bytes(call) <= kMaxTableBytes;
}

void plan_lut(LowbitPlan& plan) {
  plan.padded_cols = round_up(plan.call.cols, chunk_codes(plan.call.bits));
  plan.operand_bytes = table_bytes(plan.call);
  plan.has_units = true;
  plan.block_act_rows = std::min(kBlockActRows, plan.act_rows());
  plan.block_panels = kBlockPanels;
  // Words of some chunks, and scales.
  plan.scratch_bytes = kVectors * 64 * (16 * kChunksAtOnce + plan.call.groups);
}

// ---- Tables ----

// The largest sum of magnitudes of the 4 / Bits neighbours that share a nibble, divided by 8 so that it cannot
// overflow; NaN if any x is not finite. n is padded to 16 with zeros.
template <int Bits>
float largest_sum(const float* x, int64_t n) {
  __m512 largest = _mm512_setzero_ps(), poison = largest;
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i), size = _mm512_mul_ps(_mm512_abs_ps(v), _mm512_set1_ps(0.125f));
    poison = _mm512_add_ps(poison, _mm512_sub_ps(v, v));
    __m512 sum = _mm512_add_ps(size, _mm512_permute_ps(size, 0xB1));
    if constexpr (Bits == 1) sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4E));
    largest = _mm512_max_ps(largest, sum);
  }
  return _mm512_reduce_max_ps(largest) + _mm512_reduce_add_ps(poison);
}

// The smallest power of two in which magnitudes up to 8 * largest have 24 bits, and which has a finite inverse.
float unit_of(double largest) {
  int exponent;
  std::frexp(8 * largest / kLargestInteger, &exponent);
  return std::ldexp(1.0f, std::max(exponent, -126));
}

// The tables of one word for all rows: [low and high nibbles][limbs][bytes of the word][16 entries].
template <int Bits>
QK_INLINE void write_word(const float* x, const __m512 level[4 / Bits], char* to) {
  constexpr int count = 4 / Bits;
  const __m512i flip = _mm512_set1_epi32(0x8080);
  alignas(64) static constexpr auto order = [] {  // four-byte elements to their first bytes, their second bytes, ...
    struct {
      uint8_t at[64];
    } t{};
    for (int i = 0; i < 64; ++i) t.at[i] = static_cast<uint8_t>(i % 16 * 4 + i / 16);
    return t;
  }();
  for (int half = 0; half < 2; ++half) {
    __m512i t[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const float* const from = x + (2 * j + half) * count;
      __m512 sum = _mm512_mul_ps(level[0], _mm512_set1_ps(from[0]));
#pragma GCC unroll 4
      for (int i = 1; i < count; ++i) sum = _mm512_fmadd_ps(level[i], _mm512_set1_ps(from[i]), sum);
      const __m512i v = _mm512_cvtps_epi32(sum);
      // Limbs from -128 to 127: adding 128 to each carries as that range wants, and flipping its top bit takes the 128
      // off again.
      t[j] = _mm512_permutexvar_epi8(_mm512_load_si512(order.at), _mm512_xor_si512(_mm512_add_epi32(v, flip), flip));
    }
    const __m512i a = _mm512_shuffle_i32x4(t[0], t[1], 0x44), b = _mm512_shuffle_i32x4(t[2], t[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(t[0], t[1], 0xEE), d = _mm512_shuffle_i32x4(t[2], t[3], 0xEE);
    char* const limbs = to + kHalfBytes * half;
    _mm512_store_si512(limbs, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_store_si512(limbs + 64, _mm512_shuffle_i32x4(a, b, 0xDD));
    _mm512_store_si512(limbs + 128, _mm512_shuffle_i32x4(c, d, 0x88));
  }
}

// The tables of a token and, for each group, their unit.
template <int Bits>
void write_tables(const LowbitPlan& plan, const float* x, char* tables, float* units) {
  constexpr int count = 4 / Bits;
  const LowbitLinearCall& call = plan.call;
  const double low = call.code_min + call.offset;
  __m512 level[count];
  for (int i = 0; i < count; ++i) {
    alignas(64) float of[16];
    for (int entry = 0; entry < 16; ++entry) of[entry] = static_cast<float>(low + (entry >> (i * Bits)) % (1 << Bits));
    level[i] = _mm512_load_ps(of);
  }
  const int64_t group_cols = call.groups == 1 ? plan.padded_cols : call.cols / call.groups;
  const int64_t group_words = group_cols / word_codes(Bits);
  for (int64_t g = 0; g < call.groups; ++g) {
    const float* const from = x + g * group_cols;
    const float largest = largest_sum<Bits>(from, group_cols);
    char* const to = tables + g * group_cols / word_codes(Bits) * kWordBytes;
    if (!(largest > 0)) {  // all zeros, or not finite: then the unit is NaN
      units[g] = largest;
      std::memset(to, 0, static_cast<size_t>(group_words * kWordBytes));
      continue;
    }
    units[g] = unit_of(-low * largest);
    __m512 in_units[count];  // exact, a power of two; dividing x instead could overflow
    for (int i = 0; i < count; ++i) in_units[i] = _mm512_mul_ps(level[i], _mm512_set1_ps(1 / units[g]));
    for (int64_t w = 0; w < group_words; ++w)
      write_word<Bits>(from + w * word_codes(Bits), in_units, to + w * kWordBytes);
  }
}

void prepare(const LowbitPlan& plan, const LowbitActivations& to, int64_t token, float* x, float*) {
  char* const tables = to.row(token);
  float* const units = to.units + token * plan.call.groups;
  plan.call.bits == 1 ? write_tables<1>(plan, x, tables, units) : write_tables<2>(plan, x, tables, units);
}

// ---- Lookup ----

// In assembly, because around the intrinsic compilers add register copies when there are many sums.
QK_INLINE void add_bytes(__m512i& acc, __m512i ones, __m512i bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(ones), "v"(bytes));
}

// sums += scale * unit * (sum of the looked-up entries of `count` words), for `Vectors` times sixteen rows; sums of a
// panel are panel_stride floats after those of the one before. Meanwhile the packed bytes of the rows to come, from
// `next` on, are prefetched evenly and in memory order: the hardware does not predict what comes after so many rows at
// once.
template <int Vectors>
__attribute__((noinline)) void look_up(const __m512i* words, int64_t count, const char* tables, const float* scale,
                                       int64_t groups, float unit, float* sums, int64_t panel_stride,
                                       const uint8_t* next) {
  const __m512i nibble = _mm512_set1_epi8(15), place = _mm512_set1_epi32(0x30201000), ones = _mm512_set1_epi8(1);
  __m512i acc[Vectors][kLimbs];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v)
#pragma GCC unroll 3
    for (int d = 0; d < kLimbs; ++d) acc[v][d] = _mm512_setzero_si512();
  for (int64_t w = 0; w < count; ++w, tables += kWordBytes, next += 64 * Vectors) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) _mm_prefetch(reinterpret_cast<const char*>(next + 64 * v), _MM_HINT_T0);
    __m512i low[Vectors], high[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const __m512i word = _mm512_load_si512(words + w * kVectors + v);
      low[v] = _mm512_ternarylogic_epi32(word, nibble, place, 0xEA);  // (word & nibble) | place
      high[v] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(word, 4), nibble, place, 0xEA);
    }
#pragma GCC unroll 3
    for (int d = 0; d < kLimbs; ++d) {
      const __m512i first = _mm512_load_si512(tables + 64 * d);
      const __m512i second = _mm512_load_si512(tables + kHalfBytes + 64 * d);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        add_bytes(acc[v][d], ones, _mm512_permutexvar_epi8(low[v], first));
        add_bytes(acc[v][d], ones, _mm512_permutexvar_epi8(high[v], second));
      }
    }
  }
  const __m512 base = _mm512_set1_ps(256);
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    __m512 sum = _mm512_cvtepi32_ps(acc[v][2]);
    sum = _mm512_fmadd_ps(sum, base, _mm512_cvtepi32_ps(acc[v][1]));
    sum = _mm512_fmadd_ps(sum, base, _mm512_cvtepi32_ps(acc[v][0]));
    float* const to = sums + v * 16 / kPanel * panel_stride + v * 16 % kPanel;
    sum = _mm512_mul_ps(sum, _mm512_load_ps(scale + 16 * groups * v));
    _mm512_store_ps(to, _mm512_fmadd_ps(sum, _mm512_set1_ps(unit), _mm512_load_ps(to)));
  }
}

// The words of 64 bytes of sixteen rows, kVectors registers apart.
__attribute__((noinline)) void read_words(const uint8_t* from, int64_t stride, __m512i* to) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r, from += stride) t[r] = _mm512_loadu_si512(from);
  transpose(t);
#pragma GCC unroll 16
  for (int w = 0; w < 16; ++w) _mm512_store_si512(to + w * kVectors, t[w]);
}

// The words of a chunk of all rows of a block, [16 words, kVectors].
template <int Bits>
void read_chunk(const LowbitBlock& b, int64_t chunk, __m512i* to) {
  const int64_t stride = row_bytes(b.plan.call.cols, Bits);
  const uint8_t* from = b.plan.call.packed + b.first_row * stride;
  for (int64_t rows = b.rows; rows > 0; rows -= 16, from += 16 * stride, ++to) {
    if (rows >= 16 && (chunk + 1) * 64 <= stride) {
      read_words(from + chunk * 64, stride, to);
      continue;
    }
    __m512i t[16];
    load_words<Bits>(from, stride, rows, chunk, t);
    for (int w = 0; w < 16; ++w) _mm512_store_si512(to + w * kVectors, t[w]);
  }
}

template <int Bits>
void multiply_bits(const LowbitBlock& b, float* sums, float* scratch) {
  const LowbitLinearCall& call = b.plan.call;
  const int64_t chunks = b.plan.padded_cols / chunk_codes(Bits), groups = call.groups;
  const int64_t group_words = groups == 1 ? chunks * 16 : call.cols / groups / word_codes(Bits);
  const int64_t vectors = (b.rows + 15) / 16, panel_stride = b.act_rows * kPanel;
  const uint8_t* const next = call.packed + (b.first_row + b.rows) * row_bytes(call.cols, Bits);
  __m512i* const words = reinterpret_cast<__m512i*>(scratch);
  float* const scale = scratch + kChunksAtOnce * 16 * kVectors * 16;
  for (int64_t v = 0; v < vectors; ++v)
    transpose_scales(b, b.first_row + 16 * v, scale + 16 * groups * v, nullptr, 0.0f);
  std::memset(sums, 0, static_cast<size_t>((b.rows + kPanel - 1) / kPanel * panel_stride) * sizeof(float));
  constexpr decltype(&look_up<1>) of_size[] = {look_up<1>, look_up<2>, look_up<3>, look_up<4>};
  for (int64_t c = 0; c < chunks; c += kChunksAtOnce) {
    const int64_t last = std::min(chunks, c + kChunksAtOnce), end = std::min(last * 16, groups * group_words);
    for (int64_t d = c; d < last; ++d) read_chunk<Bits>(b, d, words + (d - c) * 16 * kVectors);
    for (int64_t i = 0; i < b.act_rows; ++i) {
      const int64_t act_row = b.first_act_row + i;
      for (int64_t w = c * 16; w < end;) {
        const int64_t group = w / group_words, until = std::min(end, (group + 1) * group_words);
        of_size[vectors - 1](words + (w - c * 16) * kVectors, until - w, b.x.row(act_row) + w * kWordBytes,
                             scale + 16 * group, groups, b.x.units[act_row * groups + group], sums + i * kPanel,
                             panel_stride, next + w * 64 * vectors);
        w = until;
      }
    }
  }
}

void multiply(const LowbitBlock& b, float* sums, void* scratch_) {
  float* const scratch = static_cast<float*>(scratch_);
  b.plan.call.bits == 1 ? multiply_bits<1>(b, sums, scratch) : multiply_bits<2>(b, sums, scratch);
  finish_panels(b, sums);
}

}  // namespace

const LowbitKernel lut_kernel{serves, plan_lut, prepare, multiply};
#endif

}  // namespace QK_ISA
}  // namespace qk
