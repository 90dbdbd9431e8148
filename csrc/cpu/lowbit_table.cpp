// Products with packed weights of 1 and 2 bits, looked up: nothing is multiplied.
//
// Four bits of a row are four codes, or two, and meet as many activations: sixteen sums are possible. They are made
// once for each token, and every row looks its own up. In a word of a row there are eight such nibbles, and an
// instruction looks four of them up for sixteen rows: the table of byte j of the words lies in bytes 16 j ... 16 j
// + 15.
//
// Tables hold whole multiples of a power of two, 24 bits of them, as three digits to the base 256. So all sums are sums
// of integers. What is rounded is an entry, by at most 2^-23 of the largest: for K inputs no more than float32 sums
// lose (K / 2 times 2^-23), and nothing for bfloat16 activations within 2^-13 of the largest.
#include <cmath>

#include "lowbit_words.h"

namespace qk {
namespace QK_ISA {

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
namespace {

constexpr int64_t kVectors = kTablePanels * kPanel / 16;  // of sixteen rows, at most
constexpr int64_t kPiece = 4;                             // chunks whose words are in the first cache at once

// Largest sum of the magnitudes of neighbours, as many as `Bits` makes a nibble of, an eighth of it so that it is
// finite; NaN if a number is not finite. Reads whole sixteens, of which what does not count is zero.
template <int Bits>
float largest_sum(const float* x, int64_t n) {
  __m512 most = _mm512_setzero_ps(), poison = most;
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i), size = _mm512_mul_ps(_mm512_abs_ps(v), _mm512_set1_ps(0.125f));
    poison = _mm512_add_ps(poison, _mm512_sub_ps(v, v));
    __m512 sum = _mm512_add_ps(size, _mm512_permute_ps(size, 0xB1));
    if constexpr (Bits == 1) sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4E));
    most = _mm512_max_ps(most, sum);
  }
  return _mm512_reduce_max_ps(most) + _mm512_reduce_add_ps(poison);
}

// Smallest power of two in which magnitudes up to 8 * most have 24 bits; with a finite inverse.
float unit_of(double most) {
  int exponent;
  std::frexp(8 * most / kLargest, &exponent);
  return std::ldexp(1.0f, std::max(exponent, -126));
}

// The tables of one word of all rows: [low and high nibbles][digits][bytes of the word][16].
template <int Bits>
QK_HD void write_word(const float* x, const __m512 level[4 / Bits], char* to) {
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
      // The digits from -128 to 127: 128 more make them carry right, and the bytes are then 128 too large.
      t[j] = _mm512_permutexvar_epi8(_mm512_load_si512(order.at), _mm512_xor_si512(_mm512_add_epi32(v, flip), flip));
    }
    const __m512i a = _mm512_shuffle_i32x4(t[0], t[1], 0x44), b = _mm512_shuffle_i32x4(t[2], t[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(t[0], t[1], 0xEE), d = _mm512_shuffle_i32x4(t[2], t[3], 0xEE);
    _mm512_store_si512(to + 192 * half, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_store_si512(to + 192 * half + 64, _mm512_shuffle_i32x4(a, b, 0xDD));
    _mm512_store_si512(to + 192 * half + 128, _mm512_shuffle_i32x4(c, d, 0x88));
  }
}

template <int Bits>
void write(const LowbitLinearCall& call, const float* x, const Activations& a, char* line, float* units) {
  constexpr int count = 4 / Bits;
  const double low = call.code_min + call.offset;
  __m512 level[count];
  for (int i = 0; i < count; ++i) {
    alignas(64) float of[16];
    for (int entry = 0; entry < 16; ++entry) of[entry] = static_cast<float>(low + (entry >> (i * Bits)) % (1 << Bits));
    level[i] = _mm512_load_ps(of);
  }
  const int64_t size = call.groups == 1 ? a.padded : call.cols / call.groups;
  for (int64_t g = 0; g < call.groups; ++g) {
    const float* const from = x + g * size;
    const float most = largest_sum<Bits>(from, size);
    char* const to = line + g * size / word_codes(Bits) * kWordTables;
    if (!(most > 0)) {  // nothing, or nothing that is a number
      units[g] = most;
      std::memset(to, 0, static_cast<size_t>(size / word_codes(Bits) * kWordTables));
      continue;
    }
    units[g] = unit_of(-low * most);
    __m512 in_units[count];  // an exact change of the exponent, and sums of the largest activations are then finite
    for (int i = 0; i < count; ++i) in_units[i] = _mm512_mul_ps(level[i], _mm512_set1_ps(1 / units[g]));
    for (int64_t w = 0; w < size / word_codes(Bits); ++w)
      write_word<Bits>(from + w * word_codes(Bits), in_units, to + w * kWordTables);
  }
}

// In assembly: with many sums compilers copy them about around the intrinsic.
QK_HD void add_bytes(__m512i& acc, __m512i ones, __m512i bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(ones), "v"(bytes));
}

// sums += scale * unit * what `count` words look up, for `Vectors` times sixteen rows; a panel's sums are `apart`. What
// the words of the next rows are in is asked for evenly meanwhile, in the order it lies in: the hardware does not see
// what comes after so many rows at once.
template <int Vectors>
__attribute__((noinline)) void look_up(const __m512i* words, int64_t count, const char* tables, const float* scale,
                                       int64_t groups, float unit, float* sums, int64_t apart, const uint8_t* next) {
  const __m512i nibble = _mm512_set1_epi8(15), place = _mm512_set1_epi32(0x30201000), ones = _mm512_set1_epi8(1);
  __m512i acc[Vectors][kDigits];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v)
#pragma GCC unroll 3
    for (int d = 0; d < kDigits; ++d) acc[v][d] = _mm512_setzero_si512();
  for (int64_t w = 0; w < count; ++w, tables += kWordTables, next += 64 * Vectors) {
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
    for (int d = 0; d < kDigits; ++d) {
      const __m512i first = _mm512_load_si512(tables + 64 * d), second = _mm512_load_si512(tables + 192 + 64 * d);
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
    __m512 number = _mm512_cvtepi32_ps(acc[v][2]);
    number = _mm512_fmadd_ps(number, base, _mm512_cvtepi32_ps(acc[v][1]));
    number = _mm512_fmadd_ps(number, base, _mm512_cvtepi32_ps(acc[v][0]));
    float* const to = sums + v * 16 / kPanel * apart + v * 16 % kPanel;
    number = _mm512_mul_ps(number, _mm512_load_ps(scale + 16 * groups * v));
    _mm512_store_ps(to, _mm512_fmadd_ps(number, _mm512_set1_ps(unit), _mm512_load_ps(to)));
  }
}

// The words of 64 bytes of sixteen rows.
__attribute__((noinline)) void read_words(const uint8_t* from, int64_t stride, __m512i* to) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r, from += stride) t[r] = _mm512_loadu_si512(from);
  transpose(t);
#pragma GCC unroll 16
  for (int w = 0; w < 16; ++w) _mm512_store_si512(to + w * kVectors, t[w]);
}

// Those of the block's rows, some of which may not be there.
template <int Bits>
void read_chunk(const RowBlock& b, int64_t chunk, __m512i* to) {
  const int64_t stride = row_bytes(b.call.cols, Bits);
  const uint8_t* from = b.call.packed + b.first_row * stride;
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
void multiply(const RowBlock& b, float* sums, float* scratch) {
  const LowbitLinearCall& call = b.call;
  const Activations& a = b.activations;
  const int64_t chunks = a.padded / chunk_codes(Bits), groups = call.groups;
  const int64_t group_words = groups == 1 ? chunks * 16 : call.cols / groups / word_codes(Bits);
  const int64_t vectors = (b.rows + 15) / 16, apart = b.lines * kPanel;
  const uint8_t* const next = call.packed + (b.first_row + b.rows) * row_bytes(call.cols, Bits);
  __m512i* const words = reinterpret_cast<__m512i*>(scratch);
  float* const scale = scratch + kPiece * 16 * kVectors * 16;
  for (int64_t v = 0; v < vectors; ++v) gather_factors(b, b.first_row + 16 * v, scale + 16 * groups * v, nullptr, 0.0f);
  std::memset(sums, 0, static_cast<size_t>((b.rows + kPanel - 1) / kPanel * apart * 4));
  constexpr decltype(&look_up<1>) kernels[] = {look_up<1>, look_up<2>, look_up<3>, look_up<4>};
  for (int64_t c = 0; c < chunks; c += kPiece) {
    const int64_t last = std::min(chunks, c + kPiece), end = std::min(last * 16, groups * group_words);
    for (int64_t d = c; d < last; ++d) read_chunk<Bits>(b, d, words + (d - c) * 16 * kVectors);
    for (int64_t line = b.first_line; line < b.first_line + b.lines; ++line) {
      float* const to = sums + (line - b.first_line) * kPanel;
      for (int64_t w = c * 16; w < end;) {
        const int64_t group = w / group_words, until = std::min(end, (group + 1) * group_words);
        kernels[vectors - 1](words + (w - c * 16) * kVectors, until - w, a.line(line) + w * kWordTables,
                             scale + 16 * group, groups, a.units[line * groups + group], to, apart,
                             next + w * 64 * vectors);
        w = until;
      }
    }
  }
}

}  // namespace

void write_tables(const LowbitLinearCall& call, const float* x, const Activations& to, char* line, float* units) {
  call.bits == 1 ? write<1>(call, x, to, line, units) : write<2>(call, x, to, line, units);
}
void multiply_tables(const RowBlock& block, float* sums, void* scratch) {
  float* const aside = static_cast<float*>(scratch);
  block.call.bits == 1 ? multiply<1>(block, sums, aside) : multiply<2>(block, sums, aside);
}
#else
void write_tables(const LowbitLinearCall&, const float*, const Activations&, char*, float*) {}
void multiply_tables(const RowBlock&, float*, void*) {}
#endif

}  // namespace QK_ISA
}  // namespace qk
