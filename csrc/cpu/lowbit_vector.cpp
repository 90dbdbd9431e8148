// Products with packed weights on AVX-512: pairs of bfloat16, fours of int8.
#include <utility>

#include "lowbit_words.h"

namespace qk {
namespace QK_ISA {

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
namespace {

// A line of activations as operands of elements of type T. Operand after operand has to meet it: the elements of one
// are apart in a word, and by chunk the operands of sixteen words follow each other instead of those of one.
template <class T>
struct Writer {
  static constexpr int64_t width = 4 / sizeof(T), step = 64 / sizeof(T);

  // `step` numbers as elements.
  static QK_HD __m512i elements(const float* x) {
    const auto at = [x](int i) { return _mm512_loadu_ps(x + 16 * i); };
    if constexpr (width == 2) {
      const auto half = [&](int i) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(at(i)), 16)); };
      return _mm512_inserti64x4(_mm512_castsi256_si512(half(0)), half(1), 1);
    } else {
      const auto quarter = [&](int i) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(at(i))); };
      return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(quarter(1), quarter(0))),
                                _mm256_set_m128i(quarter(3), quarter(2)), 1);
    }
  }
  static QK_HD __m512i permute(__m512i order, __m512i v) {
    return width == 2 ? _mm512_permutexvar_epi16(order, v) : _mm512_permutexvar_epi8(order, v);
  }

  template <int Bits>
  static void write(const float* x, const Activations& a, int32_t* to) {
    constexpr int64_t word = word_codes(Bits), codes = chunk_codes(Bits), operands = word / width;
    alignas(64) T from[step];
    for (int64_t i = 0; i < step; ++i)
      from[i] = static_cast<T>(i / word * word + i % word / width + i % width * operands);
    const __m512i order = _mm512_load_si512(from);
    alignas(64) int32_t words[16 * operands];
    for (int64_t c = 0; c < a.padded; c += codes, to += 16 * operands) {
      int32_t* const in_order = a.by_chunk ? words : to;
      for (int64_t i = 0; i < codes; i += step)
        _mm512_store_si512(in_order + i / width, permute(order, elements(x + c + i)));
      if (a.by_chunk)
        for (int64_t j = 0; j < operands; ++j)
#pragma GCC unroll 16
          for (int64_t w = 0; w < 16; ++w) to[j * 16 + w] = words[w * operands + j];
    }
  }
};

// How a path multiplies 32-bit operands, and how it makes them: `count` come out of each word.
#if defined(__AVX512BF16__)
struct Pairs {
  using Sum = __m512;
  static QK_HD Sum zero() { return _mm512_setzero_ps(); }
  static QK_HD Sum dot(Sum acc, __m512i w, __m512i x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
  // In assembly: with many sums compilers copy them about around the intrinsic.
  static QK_HD void dot_in_place(Sum& acc, __m512i w, __m512i x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  }
  static QK_HD __m512 number(Sum acc) { return acc; }
  // What the sum of activations is to be multiplied with, but for the zero point.
  static float rest(const LowbitLinearCall&) { return 0.0f; }

  template <int Bits>
  struct Operands {
    static constexpr int count = word_codes(Bits) / 2;
    // A lookup takes five bits of an element. One table for each code that is whole within them spares most shifts.
    static constexpr int step = Bits == 3 || Bits == 5 ? 8 : Bits, tables = step < 5 ? 5 / step : 1;
    __m512i levels[tables];
    __m512 low;

    explicit Operands(const LowbitLinearCall& call)
        : low(_mm512_set1_ps(static_cast<float>(call.code_min + call.offset))) {
      for (int t = 0; t < tables; ++t) {
        alignas(64) uint16_t table[32];
        for (int i = 0; i < 32; ++i) {
          const int code = (i >> (step * t)) % (1 << std::min(Bits, 5));
          const float level = static_cast<float>(code + call.code_min + call.offset);
          uint32_t bits;
          std::memcpy(&bits, &level, 4);
          table[i] = static_cast<uint16_t>(bits >> 16);  // at most eight significant bits: exact
        }
        levels[t] = _mm512_load_si512(table);
      }
    }
    QK_HD __m512i get(__m512i word, int j) const {
      if constexpr (Bits <= 5) {
        const int first = j - j % tables;
        const __m512i codes = first ? _mm512_srli_epi16(word, static_cast<unsigned>(step * first)) : word;
        return _mm512_permutexvar_epi16(codes, levels[j % tables]);
      } else {
        const __m512i codes = j ? _mm512_srli_epi16(word, 8) : _mm512_and_si512(word, _mm512_set1_epi32(0x00FF00FF));
        const __m512 even = _mm512_add_ps(_mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(0xFFFF))), low);
        const __m512 odd = _mm512_add_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(codes, 16)), low);
        return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(_mm512_castps_si512(even), 16),
                                       _mm512_castps_si512(odd));
      }
    }
  };
};
#endif

struct Fours {
  using Sum = __m512i;
  static QK_HD Sum zero() { return _mm512_setzero_si512(); }
  static QK_HD Sum dot(Sum acc, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(acc, w, x); }
  static QK_HD void dot_in_place(Sum& acc, __m512i w, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  }
  static QK_HD __m512 number(Sum acc) { return _mm512_cvtepi32_ps(acc); }
  static float rest(const LowbitLinearCall& call) { return static_cast<float>(call.offset + call.code_min); }

  template <int Bits>
  struct Operands {
    static constexpr int count = word_codes(Bits) / 4;
    explicit Operands(const LowbitLinearCall&) {}
    QK_HD __m512i get(__m512i word, int j) const {
      if constexpr (Bits == 1 || Bits == 2 || Bits == 4)
        return _mm512_and_si512(j ? _mm512_srli_epi32(word, static_cast<unsigned>(Bits * j)) : word,
                                _mm512_set1_epi8((1 << Bits) - 1));
      else
        return word;
    }
  };
};

QK_HD __m512i broadcast(const char* x, int64_t i) {
  int32_t v;
  std::memcpy(&v, x + 4 * i, 4);
  return _mm512_set1_epi32(v);
}

// The factors of `rows` rows, [rows, groups], and up to fifteen floats more.
void write_scales(const LowbitLinearCall& call, int64_t first_row, int64_t rows, float* to) {
  const int64_t n = rows * call.groups;
  for (int64_t i = 0; i < n; i += 16)
    _mm512_storeu_ps(to + i, scales_at(call, first_row * call.groups + i, first_lanes(n - i)));
}

// Rows follow each other in memory, so this far on are bytes of later rows. Prefetchers of the hardware follow one row
// and start anew at each: asking for the bytes here made 16384 x 16384 codes of 1 bit 1.3 times as fast, of 4 bits 1.15
// times.
constexpr int64_t kAhead = 1 << 17;

// A few lines: row by row, codes go from the packed bytes through registers into the products, sixteen words at a time.
// Lane i of an operand is a pair or four of word i, so this takes its activations chunk by chunk, operand by operand.
template <int Bits, class Kind, int Lines>
void multiply_rows(const RowBlock& b, float* sums, float* scratch) {
  using Operands = typename Kind::template Operands<Bits>;
  constexpr int kRows = Lines > 2 ? 2 : Lines == 2 ? 4 : 8;  // at once: independent sums, and activations loaded once
  constexpr int64_t codes = chunk_codes(Bits), bytes = codes * Bits / 8;
  const LowbitLinearCall& call = b.call;
  const Operands operands(call);
  const int64_t stride = row_bytes(call.cols, Bits), chunks = b.activations.padded / codes, groups = call.groups;
  const int64_t size = groups == 1 ? chunks * codes : call.cols / groups;
  const int64_t chunk_groups = std::max<int64_t>(1, codes / size), group_chunks = std::max<int64_t>(1, size / codes);
  alignas(64) int32_t lane_groups[16];
  for (int i = 0; i < 16; ++i) lane_groups[i] = static_cast<int32_t>(i * chunk_groups / 16);
  const __m512i lanes = _mm512_load_si512(lane_groups);
  const auto in_chunk = static_cast<__mmask16>((1u << chunk_groups) - 1);
  const bool rest = b.activations.sums != nullptr;
  write_scales(call, b.first_row, b.rows, scratch);
  const char* x[Lines];
  for (int t = 0; t < Lines; ++t) x[t] = b.activations.line(b.first_line + t);
  for (int64_t r = 0; r < b.rows; r += kRows) {
    const uint8_t* row[kRows];
    const float* scale[kRows];
    for (int i = 0; i < kRows; ++i) {
      const int64_t n = std::min(r + i, b.rows - 1);
      row[i] = call.packed + (b.first_row + n) * stride;
      scale[i] = scratch + n * groups;
    }
    __m512 total[kRows][Lines];
    for (int i = 0; i < kRows; ++i)
      for (int t = 0; t < Lines; ++t) total[i][t] = _mm512_setzero_ps();
    for (int64_t c = 0; c < chunks;) {
      typename Kind::Sum acc[kRows][Lines];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int t = 0; t < Lines; ++t) acc[i][t] = Kind::zero();
      const int64_t first_group = c * codes / size;
      const auto in_row = static_cast<__mmask16>(in_chunk & first_lanes(groups - first_group));
      for (const int64_t last = std::min(chunks, c + group_chunks); c < last; ++c) {
        const __mmask64 valid = first_bytes(std::min(bytes, stride - c * bytes));
        __m512i words[kRows];
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          words[i] = _mm512_maskz_loadu_epi8(valid, row[i] + c * bytes);
          _mm_prefetch(reinterpret_cast<const char*>(row[i] + c * bytes + kAhead), _MM_HINT_T1);
          if constexpr (Bits == 3 || Bits == 5 || Bits == 6 || Bits == 7) words[i] = expand<Bits>(words[i]);
        }
#pragma GCC unroll 16
        for (int j = 0; j < Operands::count; ++j) {
          __m512i v[Lines];
#pragma GCC unroll 4
          for (int t = 0; t < Lines; ++t) v[t] = _mm512_load_si512(x[t] + 64 * (c * Operands::count + j));
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            const __m512i operand = operands.get(words[i], j);
#pragma GCC unroll 4
            for (int t = 0; t < Lines; ++t) acc[i][t] = Kind::dot(acc[i][t], operand, v[t]);
          }
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const __m512 s = chunk_groups == 1
                             ? _mm512_set1_ps(scale[i][first_group])
                             : _mm512_permutexvar_ps(lanes, _mm512_maskz_loadu_ps(in_row, scale[i] + first_group));
#pragma GCC unroll 4
        for (int t = 0; t < Lines; ++t) total[i][t] = _mm512_fmadd_ps(s, Kind::number(acc[i][t]), total[i][t]);
      }
    }
    for (int i = 0; i < kRows && r + i < b.rows; ++i)
      for (int t = 0; t < Lines; ++t) {
        if (rest) {
          const float* const x_sums = b.activations.sums + (b.first_line + t) * groups;
          const float* const z = call.zero_point ? call.zero_point + (b.first_row + r + i) * groups : nullptr;
          for (int64_t g = 0; g < groups; g += 16) {
            const __mmask16 valid = first_lanes(groups - g);
            const __m512 zero = z ? _mm512_maskz_loadu_ps(valid, z + g) : _mm512_setzero_ps();
            const __m512 of_group = _mm512_mul_ps(_mm512_sub_ps(_mm512_set1_ps(Kind::rest(call)), zero),
                                                  _mm512_maskz_loadu_ps(valid, x_sums + g));
            total[i][t] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(valid, scale[i] + g), of_group, total[i][t]);
          }
        }
        sums[t * kPanel + r + i] = _mm512_reduce_add_ps(total[i][t]);
      }
  }
}

constexpr int64_t kDecoded = 512;  // columns of a panel that are decoded at once
constexpr int kTile = 12;          // lines whose sums stay in registers

// Decoded columns of a panel, the groups that they are of, and the packed bytes that come next.
struct Piece {
  const __m512i* operands;  // [count, 2]
  int64_t count;
  int64_t group, first;       // of the first operand: its group, and its place in there
  int64_t groups, length;     // of a row, and of a group in operands
  const float *scale, *rest;  // [2, groups, 16]; rest may be null
  const uint8_t* next;        // [kPanel, next_bytes], a row every next_stride
  int64_t next_stride, next_bytes;

  // Ask for some rows of what comes next. All at once would be more than the cache waits for.
  void prefetch(int64_t row, int64_t until) const {
    for (; row < until; ++row)
      for (int64_t i = 0; i < next_bytes; i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(next + row * next_stride + i), _MM_HINT_T0);
  }
};

// sums[t] += scale * (operands . x[t] + rest * x_sums[t]) for `Lines` lines, group by group.
template <class Kind, int Lines>
void multiply_tile(const Piece& p, const char* x, int64_t stride, const float* x_sums, float* sums) {
  for (int t = 0; t < Lines * kPanel; t += 16) _mm_prefetch(reinterpret_cast<const char*>(sums + t), _MM_HINT_T0);
  int64_t group = p.group, first = p.first;
  for (int64_t i = 0; i < p.count; ++group, first = 0) {
    typename Kind::Sum acc[Lines][2];
#pragma GCC unroll 12
    for (int t = 0; t < Lines; ++t) acc[t][0] = acc[t][1] = Kind::zero();
    asm volatile("" ::: "memory");  // or compilers load all of `sums` ahead, into registers that are taken
    for (const int64_t end = std::min(p.count, i + p.length - first); i < end; ++i) {
      const __m512i w0 = _mm512_load_si512(p.operands + 2 * i), w1 = _mm512_load_si512(p.operands + 2 * i + 1);
#pragma GCC unroll 12
      for (int t = 0; t < Lines; ++t) {
        const __m512i v = broadcast(x + t * stride, i);
        Kind::dot_in_place(acc[t][0], w0, v);
        Kind::dot_in_place(acc[t][1], w1, v);
      }
    }
    const bool with_rest = p.rest && first == 0;  // once for each group
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const int64_t at = 16 * (p.groups * h + group);
      const __m512 scale = _mm512_load_ps(p.scale + at);
      const __m512 rest = with_rest ? _mm512_load_ps(p.rest + at) : _mm512_setzero_ps();
#pragma GCC unroll 12
      for (int t = 0; t < Lines; ++t) {
        float* const to = sums + t * kPanel + 16 * h;
        __m512 v = Kind::number(acc[t][h]);
        if (with_rest) v = _mm512_fmadd_ps(rest, _mm512_set1_ps(x_sums[t * p.groups + group]), v);
        _mm512_store_ps(to, _mm512_fmadd_ps(scale, v, _mm512_load_ps(to)));
      }
    }
  }
}

// All lines, tile by tile. The last two share what would leave little for one: its products would wait for each other.
template <class Kind, int... Less>
void multiply_tiles(std::integer_sequence<int, Less...>, const Piece& p, int64_t lines, const char* x, int64_t stride,
                    const float* x_sums, float* sums) {
  constexpr decltype(&multiply_tile<Kind, 1>) of_size[] = {multiply_tile<Kind, Less + 1>...};
  for (int64_t line = 0, n; line < lines; line += n) {
    const int64_t left = lines - line;
    n = left > kTile && left < kTile + kTile / 2 ? (left + 1) / 2 : std::min<int64_t>(kTile, left);
    p.prefetch(kPanel * line / lines, kPanel * (line + n) / lines);
    of_size[n - 1](p, x + line * stride, stride, x_sums ? x_sums + line * p.groups : nullptr, sums + line * kPanel);
  }
}

// Many lines: a piece of the panel is decoded once and stays in the cache while all lines meet it.
template <int Bits, class Kind>
void multiply_many(const RowBlock& b, float* sums, float* scratch) {
  using Operands = typename Kind::template Operands<Bits>;
  const LowbitLinearCall& call = b.call;
  const Operands operands(call);
  const int64_t stride = row_bytes(call.cols, Bits), chunks = b.activations.padded / chunk_codes(Bits);
  const int64_t groups = call.groups;
  const int64_t group_words = groups == 1 ? chunks * 16 : call.cols / groups / word_codes(Bits);
  const uint8_t* const rows = call.packed + b.first_row * stride;
  constexpr int64_t bytes = chunk_codes(Bits) * Bits / 8;
  constexpr int64_t piece = kDecoded / chunk_codes(Bits) > 0 ? kDecoded / chunk_codes(Bits) : 1;
  __m512i* const decoded = reinterpret_cast<__m512i*>(scratch);
  float* const scale = scratch + 16 * kDecoded;
  float* const rest = b.activations.sums ? scale + 32 * groups : nullptr;
  for (int h = 0; h < 2; ++h)
    gather_factors(b, b.first_row + 16 * h, scale + 16 * groups * h, rest ? rest + 16 * groups * h : nullptr,
                   Kind::rest(call));
  std::memset(sums, 0, static_cast<size_t>(b.lines * kPanel * 4));
  const char* const x = b.activations.line(b.first_line);
  const int64_t x_stride = b.activations.stride();
  const float* const x_sums = rest ? b.activations.sums + b.first_line * groups : nullptr;
  for (int64_t c = 0; c < chunks; c += piece) {
    const int64_t last = std::min(chunks, c + piece);
    for (int64_t d = c; d < last; ++d)
      for (int h = 0; h < 2; ++h) {
        __m512i words[16];
        load_words<Bits>(rows + 16 * h * stride, stride, b.rows - 16 * h, d, words);
        for (int w = 0; w < 16; ++w)
#pragma GCC unroll 16
          for (int j = 0; j < Operands::count; ++j)
            _mm512_store_si512(decoded + (((d - c) * 16 + w) * Operands::count + j) * 2 + h, operands.get(words[w], j));
      }
    const int64_t end = std::min(last * 16, groups * group_words);
    const int64_t group = c * 16 / group_words;
    const Piece part{
        .operands = decoded,
        .count = (end - c * 16) * Operands::count,
        .group = group,
        .first = (c * 16 - group * group_words) * Operands::count,
        .groups = groups,
        .length = group_words * Operands::count,
        .scale = scale,
        .rest = rest,
        .next = last < chunks ? rows + last * bytes : rows + kPanel * stride,
        .next_stride = stride,
        .next_bytes = piece * bytes,
    };
    multiply_tiles<Kind>(std::make_integer_sequence<int, kTile>(), part, b.lines, x + c * 16 * Operands::count * 4,
                         x_stride, x_sums, sums);
  }
}

template <class Kind>
void multiply(const RowBlock& b, float* sums, void* scratch) {
  float* const aside = static_cast<float*>(scratch);
  with_bits(b.call.bits, [&](auto bits) {
    if (!b.activations.by_chunk) return multiply_many<bits, Kind>(b, sums, aside);
    for (int64_t line = 0; line < b.lines; line += 4) {  // the codes come from the cache but for the first time
      RowBlock some = b;
      some.first_line += line;
      some.lines = std::min<int64_t>(4, b.lines - line);
      float* const to = sums + line * kPanel;
      switch (some.lines) {
        case 1:
          multiply_rows<bits, Kind, 1>(some, to, aside);
          break;
        case 2:
          multiply_rows<bits, Kind, 2>(some, to, aside);
          break;
        case 3:
          multiply_rows<bits, Kind, 3>(some, to, aside);
          break;
        default:
          multiply_rows<bits, Kind, 4>(some, to, aside);
      }
    }
  });
}

}  // namespace

int64_t scratch_bytes(const LowbitLinearCall& call) { return 4 * (16 * kDecoded + 64 * call.groups); }

void write_fours(const float* x, const Activations& to, int bits, char* line) {
  with_bits(bits, [&](auto b) { Writer<uint8_t>::write<b>(x, to, reinterpret_cast<int32_t*>(line)); });
}
void write_pairs(const float* x, const Activations& to, int bits, char* line) {
  with_bits(bits, [&](auto b) { Writer<uint16_t>::write<b>(x, to, reinterpret_cast<int32_t*>(line)); });
}
void multiply_fours(const RowBlock& block, float* sums, void* scratch) { multiply<Fours>(block, sums, scratch); }
#else
int64_t scratch_bytes(const LowbitLinearCall&) { return 0; }
void write_pairs(const float*, const Activations&, int, char*) {}
void write_fours(const float*, const Activations&, int, char*) {}
void multiply_fours(const RowBlock&, float*, void*) {}
#endif

#if defined(__AVX512BF16__)
void multiply_pairs(const RowBlock& block, float* sums, void* scratch) { multiply<Pairs>(block, sums, scratch); }
#else
void multiply_pairs(const RowBlock&, float*, void*) {}
#endif

}  // namespace QK_ISA
}  // namespace qk
