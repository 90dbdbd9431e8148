// Products with packed weights on AVX-512 by multiply-accumulate instructions, from activations as int8 (four products
// a lane) or bfloat16 (two).
//
// bfloat16 times a code as bfloat16 is exact, and sums are float32. int8 sums are int32, exact too. With act_bits a
// token is one activation row of int8. Without, it is kLimbs: its values as integers of 24 bits, which is what float32
// sums keep of them, at 1.5 times the price of bfloat16 products instead of that of float32 products.
//
// Few activation rows are multiplied weight row by weight row (multiply_few): nothing is transposed, and each packed
// byte is read from memory once. For more, panels of weight rows are decoded once and all activation rows are
// multiplied with them (multiply_many). The picture of the layouts is in lowbit_words.h.
#include <array>
#include <utility>

#include "lowbit_finish.h"
#include "lowbit_operands.h"

namespace qk {
namespace QK_ISA {

#if defined(QK_LOWBIT_VNNI)
namespace {

// With more activation rows transposing the codes once is faster than decoding them again for every four, at 4096 x
// 4096.
constexpr int64_t kFewActRows = 12;
constexpr int64_t kFewAtOnce = 4;  // that share the decoded codes of a weight row

// Activation rows whose sums for a panel are buffered at once, at most: a multiple of kLimbs.
constexpr int64_t kBlockActRows = 528;
static_assert(kBlockActRows % kLimbs == 0);

constexpr int64_t kDecodedCols = 512;  // columns of a panel that multiply_many decodes at once
constexpr int kTileActRows = 12;       // activation rows whose sums for a panel stay in registers

// ---- Few activation rows ----

// The scales of `rows` rows, [rows, groups], and up to fifteen floats more.
void write_scales(const LowbitLinearCall& call, int64_t first_row, int64_t rows, float* to) {
  const int64_t n = rows * call.groups;
  for (int64_t i = 0; i < n; i += 16)
    _mm512_storeu_ps(to + i, load_scales(call, first_row * call.groups + i, mask_lanes(n - i)));
}

// Bytes ahead that are prefetched. Rows follow each other in memory, so these are bytes of later rows: prefetchers of
// the hardware follow one row and start anew at each. It made 16384 x 16384 codes of 1 bit 1.3 times as fast, of 4 bits
// 1.15 times.
constexpr int64_t kPrefetchBytes = 1 << 17;

// How the chunks of a weight row divide into groups: a group is whole chunks, or a chunk whole groups.
struct ChunkGroups {
  int64_t groups, group_cols, chunk_groups, group_chunks;
  __m512i lanes;   // the group that a lane of a chunk belongs to, counted from the chunk's first
  __mmask16 mask;  // a lane for each group of a chunk

  ChunkGroups(int64_t groups_, int64_t cols, int64_t chunk)
      : groups(groups_),
        group_cols(cols / groups_),
        chunk_groups(std::max<int64_t>(1, chunk / group_cols)),
        group_chunks(std::max<int64_t>(1, group_cols / chunk)),
        mask(static_cast<__mmask16>((1u << chunk_groups) - 1)) {
    alignas(64) int32_t of_lane[16];
    for (int i = 0; i < 16; ++i) of_lane[i] = static_cast<int32_t>(i * chunk_groups / 16);
    lanes = _mm512_load_si512(of_lane);
  }
  // The scales of sixteen lanes from those of a row; `present` is the part of the mask whose groups exist.
  QK_INLINE __m512 scales(const float* row, int64_t group, __mmask16 present) const {
    return chunk_groups == 1 ? _mm512_set1_ps(row[group])
                             : _mm512_permutexvar_ps(lanes, _mm512_maskz_loadu_ps(present, row + group));
  }
};

// acc += chunk c of `Rows` weight rows times `ActRows` activation rows.
template <int Bits, class Mac, int Rows, int ActRows>
QK_INLINE void multiply_chunk(const typename Mac::template Decoder<Bits>& decoder, const uint8_t* const (&row)[Rows],
                              int64_t row_stride, const char* const (&x)[ActRows], int64_t c,
                              typename Mac::Sum (&acc)[Rows][ActRows]) {
  constexpr int64_t bytes = chunk_codes(Bits) * Bits / 8;
  constexpr int kOperands = Mac::template Decoder<Bits>::kOperands;
  const __mmask64 valid = mask_bytes(std::min(bytes, row_stride - c * bytes));
  __m512i words[Rows];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    words[i] = _mm512_maskz_loadu_epi8(valid, row[i] + c * bytes);
    _mm_prefetch(reinterpret_cast<const char*>(row[i] + c * bytes + kPrefetchBytes), _MM_HINT_T1);
    if constexpr (Bits == 3 || Bits == 5 || Bits == 6 || Bits == 7) words[i] = expand<Bits>(words[i]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < kOperands; ++j) {
    __m512i v[ActRows];
#pragma GCC unroll 4
    for (int t = 0; t < ActRows; ++t) v[t] = _mm512_load_si512(x[t] + 64 * (c * kOperands + j));
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const __m512i operand = decoder.operand(words[i], j);
#pragma GCC unroll 4
      for (int t = 0; t < ActRows; ++t) acc[i][t] = Mac::dot(acc[i][t], operand, v[t]);
    }
  }
}

// The zero-point correction of a weight row: total plus, over groups, scale * (shift - zero_point) * sum of x. `zero`
// may be null.
QK_INLINE __m512 add_correction(__m512 total, const float* scale, const float* zero, float shift, const float* x_sums,
                                int64_t groups) {
  for (int64_t g = 0; g < groups; g += 16) {
    const __mmask16 valid = mask_lanes(groups - g);
    const __m512 z = zero ? _mm512_maskz_loadu_ps(valid, zero + g) : _mm512_setzero_ps();
    const __m512 of_group =
        _mm512_mul_ps(_mm512_sub_ps(_mm512_set1_ps(shift), z), _mm512_maskz_loadu_ps(valid, x_sums + g));
    total = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(valid, scale + g), of_group, total);
  }
  return total;
}

// A block of at most kFewAtOnce activation rows: codes go from the packed bytes through registers into the products,
// sixteen words of a weight row at a time, so operands are chunk-major.
template <int Bits, class Mac, int ActRows>
void multiply_few(const LowbitBlock& b, float* sums, float* scratch) {
  constexpr int kRows = ActRows > 2 ? 2 : ActRows == 2 ? 4 : 8;  // that share loaded activations; independent sums
  constexpr int64_t codes = chunk_codes(Bits);
  const LowbitLinearCall& call = b.plan.call;
  const typename Mac::template Decoder<Bits> decoder(call);
  const int64_t stride = row_bytes(call.cols, Bits), chunks = b.plan.padded_cols / codes, groups = call.groups;
  const ChunkGroups division(groups, groups == 1 ? chunks * codes : call.cols, codes);
  write_scales(call, b.first_row, b.rows, scratch);
  const char* x[ActRows];
  for (int t = 0; t < ActRows; ++t) x[t] = b.x.row(b.first_act_row + t);
  for (int64_t r = 0; r < b.rows; r += kRows) {
    const uint8_t* row[kRows];
    const float* scale[kRows];
    for (int i = 0; i < kRows; ++i) {
      const int64_t n = std::min(r + i, b.rows - 1);
      row[i] = call.packed + (b.first_row + n) * stride;
      scale[i] = scratch + n * groups;
    }
    __m512 total[kRows][ActRows];
    for (int i = 0; i < kRows; ++i)
      for (int t = 0; t < ActRows; ++t) total[i][t] = _mm512_setzero_ps();
    for (int64_t c = 0; c < chunks;) {
      typename Mac::Sum acc[kRows][ActRows];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int t = 0; t < ActRows; ++t) acc[i][t] = Mac::zero();
      const int64_t group = c * codes / division.group_cols;
      const auto present = static_cast<__mmask16>(division.mask & mask_lanes(groups - group));
      for (const int64_t last = std::min(chunks, c + division.group_chunks); c < last; ++c)
        multiply_chunk<Bits, Mac>(decoder, row, stride, x, c, acc);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const __m512 s = division.scales(scale[i], group, present);
#pragma GCC unroll 4
        for (int t = 0; t < ActRows; ++t) total[i][t] = _mm512_fmadd_ps(s, Mac::to_float(acc[i][t]), total[i][t]);
      }
    }
    for (int i = 0; i < kRows && r + i < b.rows; ++i)
      for (int t = 0; t < ActRows; ++t) {
        if (b.x.sums) {
          const float* const zero = call.zero_point ? call.zero_point + (b.first_row + r + i) * groups : nullptr;
          total[i][t] = add_correction(total[i][t], scale[i], zero, Mac::code_shift(call),
                                       b.x.sums + (b.first_act_row + t) * groups, groups);
        }
        sums[t * kPanel + r + i] = _mm512_reduce_add_ps(total[i][t]);
      }
  }
}

// ---- Many activation rows ----

// Decoded columns of a panel, their groups, and the packed bytes to prefetch for the next step.
struct DecodedColumns {
  const __m512i* operands;        // [count, 2 halves of the panel]
  int64_t count;                  // operands of a row
  int64_t group, first_in_group;  // of the first operand: its group, and its place in there
  int64_t groups, group_length;   // groups of a row, operands of a group
  const float *scale, *shift;     // [2, groups, 16]: values are scale * (operand + shift); shift may be null
  const uint8_t* next;            // [kPanel, next_bytes], rows next_stride apart
  int64_t next_stride, next_bytes;

  // Prefetches rows [row, until) of the next packed bytes. All rows at once would exceed the outstanding loads of a
  // core.
  void prefetch(int64_t row, int64_t until) const {
    for (; row < until; ++row)
      for (int64_t i = 0; i < next_bytes; i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(next + row * next_stride + i), _MM_HINT_T0);
  }
};

// What turns the sums of products of a group into values, for half a panel.
struct GroupFactors {
  __m512 scale, shift;
  bool shifted;

  GroupFactors(const DecodedColumns& w, int half, int64_t group, bool first_of_group)
      : shifted(w.shift && first_of_group) {
    const int64_t at = 16 * (w.groups * half + group);
    scale = _mm512_load_ps(w.scale + at);
    shift = shifted ? _mm512_load_ps(w.shift + at) : _mm512_setzero_ps();
  }
  // to += scale * (v + shift * x_sums[i]); without shift x_sums may be null.
  QK_INLINE void add(__m512 v, const float* x_sums, int64_t i, float* to) const {
    if (shifted) v = _mm512_fmadd_ps(shift, _mm512_set1_ps(x_sums[i]), v);
    _mm512_store_ps(to, _mm512_fmadd_ps(scale, v, _mm512_load_ps(to)));
  }
};

// sums[t] += scale * (operands . x[t] + shift * x_sums[t]), group by group, for `ActRows` activation rows t.
template <class Mac, int ActRows>
void multiply_tile(const DecodedColumns& w, const char* x, int64_t stride, const float* x_sums, float* sums) {
  for (int t = 0; t < ActRows * kPanel; t += 16) _mm_prefetch(reinterpret_cast<const char*>(sums + t), _MM_HINT_T0);
  const auto broadcast = [](const char* from) QK_INLINE_LAMBDA {
    int32_t v;
    std::memcpy(&v, from, 4);
    return _mm512_set1_epi32(v);
  };
  int64_t group = w.group, first = w.first_in_group;
  for (int64_t i = 0; i < w.count; ++group, first = 0) {
    typename Mac::Sum acc[ActRows][2];
#pragma GCC unroll 12
    for (int t = 0; t < ActRows; ++t) acc[t][0] = acc[t][1] = Mac::zero();
    asm volatile("" ::: "memory");  // or compilers load all of `sums` ahead, into registers that are taken
    for (const int64_t end = std::min(w.count, i + w.group_length - first); i < end; ++i) {
      const __m512i w0 = _mm512_load_si512(w.operands + 2 * i), w1 = _mm512_load_si512(w.operands + 2 * i + 1);
#pragma GCC unroll 12
      for (int t = 0; t < ActRows; ++t) {
        const __m512i v = broadcast(x + t * stride + 4 * i);
        Mac::dot_in_place(acc[t][0], w0, v);
        Mac::dot_in_place(acc[t][1], w1, v);
      }
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const GroupFactors factors(w, h, group, first == 0);
#pragma GCC unroll 12
      for (int t = 0; t < ActRows; ++t)
        factors.add(Mac::to_float(acc[t][h]), x_sums, t * w.groups + group, sums + t * kPanel + 16 * h);
    }
  }
}

// The tile of each size.
template <class Mac, int... Less>
constexpr auto tiles_of_size(std::integer_sequence<int, Less...>) {
  return std::array{multiply_tile<Mac, Less + 1>...};
}

// Decodes chunks [first, last) of a panel.
template <int Bits, class Mac>
__attribute__((noinline)) void decode_chunks(const LowbitBlock& b, const typename Mac::template Decoder<Bits>& decoder,
                                             int64_t first, int64_t last, __m512i* out) {
  constexpr int kOperands = Mac::template Decoder<Bits>::kOperands;
  const int64_t stride = row_bytes(b.plan.call.cols, Bits);
  const uint8_t* const rows = b.plan.call.packed + b.first_row * stride;
  for (int64_t c = first; c < last; ++c)
    for (int h = 0; h < 2; ++h) {
      __m512i words[16];
      load_words<Bits>(rows + 16 * h * stride, stride, b.rows - 16 * h, c, words);
      for (int w = 0; w < 16; ++w)
#pragma GCC unroll 16
        for (int j = 0; j < kOperands; ++j)
          _mm512_store_si512(out + (((c - first) * 16 + w) * kOperands + j) * 2 + h, decoder.operand(words[w], j));
    }
}

// A panel is decoded a few chunks at a time, which stay in the cache while all activation rows are multiplied.
template <int Bits, class Mac>
void multiply_many(const LowbitBlock& b, float* sums, float* scratch) {
  static constexpr auto of_size = tiles_of_size<Mac>(std::make_integer_sequence<int, kTileActRows>());
  constexpr int64_t kOperands = Mac::template Decoder<Bits>::kOperands;
  constexpr int64_t bytes = chunk_codes(Bits) * Bits / 8;
  const int64_t step = std::max<int64_t>(1, kDecodedCols / chunk_codes(Bits));
  const LowbitLinearCall& call = b.plan.call;
  const typename Mac::template Decoder<Bits> decoder(call);
  const int64_t stride = row_bytes(call.cols, Bits), chunks = b.plan.padded_cols / chunk_codes(Bits);
  const int64_t groups = call.groups;
  const int64_t group_words = groups == 1 ? chunks * 16 : call.cols / groups / word_codes(Bits);
  const uint8_t* const rows = call.packed + b.first_row * stride;
  __m512i* const decoded = reinterpret_cast<__m512i*>(scratch);
  float* const scale = scratch + 16 * kDecodedCols;
  float* const shift = b.x.sums ? scale + kPanel * groups : nullptr;
  for (int h = 0; h < 2; ++h)
    transpose_scales(b, b.first_row + 16 * h, scale + 16 * groups * h, shift ? shift + 16 * groups * h : nullptr,
                     Mac::code_shift(call));
  std::memset(sums, 0, static_cast<size_t>(b.act_rows * kPanel) * sizeof(float));
  const char* const x = b.x.row(b.first_act_row);
  const float* const x_sums = shift ? b.x.sums + b.first_act_row * groups : nullptr;
  for (int64_t c = 0; c < chunks; c += step) {
    const int64_t last = std::min(chunks, c + step), end = std::min(last * 16, groups * group_words);
    const int64_t group = c * 16 / group_words;
    decode_chunks<Bits, Mac>(b, decoder, c, last, decoded);
    const DecodedColumns columns{
        .operands = decoded,
        .count = (end - c * 16) * kOperands,
        .group = group,
        .first_in_group = (c * 16 - group * group_words) * kOperands,
        .groups = groups,
        .group_length = group_words * kOperands,
        .scale = scale,
        .shift = shift,
        .next = last < chunks ? rows + last * bytes : rows + kPanel * stride,
        .next_stride = stride,
        .next_bytes = step * bytes,
    };
    const char* const from = x + c * 16 * kOperands * 4;
    for (int64_t i = 0, n; i < b.act_rows; i += n) {
      const int64_t left = b.act_rows - i;
      // The last two tiles share their rows where the last would be small: its products would wait for each other.
      n = left > kTileActRows && left < kTileActRows + kTileActRows / 2 ? (left + 1) / 2
                                                                        : std::min<int64_t>(kTileActRows, left);
      columns.prefetch(kPanel * i / b.act_rows, kPanel * (i + n) / b.act_rows);
      of_size[n - 1](columns, from + i * b.x.stride, b.x.stride, x_sums ? x_sums + i * groups : nullptr,
                     sums + i * kPanel);
    }
  }
}

// ---- The kernels ----

template <class Mac>
void multiply(const LowbitBlock& b, float* sums, void* scratch_) {
  float* const scratch = static_cast<float*>(scratch_);
  with_bits(b.plan.call.bits, [&](auto bits) {
    if (!b.plan.chunk_major) return multiply_many<bits, Mac>(b, sums, scratch);
    // From the second four on the codes come from the cache.
    for (int64_t i = 0; i < b.act_rows; i += kFewAtOnce) {
      LowbitBlock few = b;
      few.first_act_row += i;
      few.act_rows = std::min(kFewAtOnce, b.act_rows - i);
      constexpr decltype(&multiply_few<bits, Mac, 1>) of_size[kFewAtOnce] = {
          multiply_few<bits, Mac, 1>, multiply_few<bits, Mac, 2>, multiply_few<bits, Mac, 3>,
          multiply_few<bits, Mac, 4>};
      of_size[few.act_rows - 1](few, sums + i * kPanel, scratch);
    }
  });
  finish_panels(b, sums);
}

// The fields of the plan that both kernels set; plan.limbs and plan.has_sums must be set before.
template <class Mac>
void plan_operands(LowbitPlan& plan) {
  const LowbitLinearCall& call = plan.call;
  const int64_t chunk = chunk_codes(call.bits), group_cols = call.cols / call.groups;
  plan.padded_cols = round_up(call.cols, chunk);
  plan.spare_bytes = plan.limbs > 1 ? plan.padded_cols * static_cast<int64_t>(sizeof(float)) : 0;
  plan.operand_bytes = plan.padded_cols * static_cast<int64_t>(sizeof(typename Mac::Element));
  // multiply_few wants groups that divide chunks or are whole chunks, and sums of int8 products below 2^31.
  plan.chunk_major = plan.act_rows() <= kFewActRows && group_cols > 0 && group_cols <= 32768 &&
                     (call.groups == 1 || group_cols % chunk == 0 || chunk % group_cols == 0);
  plan.block_act_rows = std::min(kBlockActRows, plan.act_rows());
  // Decoded columns, scales and shifts of a panel.
  plan.scratch_bytes = 64 * kDecodedCols + 2 * kPanel * call.groups * static_cast<int64_t>(sizeof(float));
}

bool serves_int8(const LowbitLinearCall& call) {
#if !defined(__AVX512VBMI__)
  // Three limbs of many tokens, whose sums are scaled group by group, take longer than float32 products. A trial on a
  // loaded Cascade Lake, 4096 x 4096 at 4 bits, over the float32 kernel: groups of 32 0.91 at 32 tokens, 1.16 at 64;
  // groups of 64 and 128 0.9 at 64 tokens, 1.2 at 256.
  const int64_t most = call.groups > 1 && call.cols / call.groups < 64 ? 48 : 128;
  if (!call.act_bits && call.groups > 1 && call.tokens > most) return false;
#endif
  return has_whole_words(call);
}

void plan_int8(LowbitPlan& plan) {
  plan.limbs = plan.call.act_bits ? 1 : kLimbs;
  plan.has_sums = true;
  plan_operands<Int8Fours>(plan);
}

void prepare_int8(const LowbitPlan& plan, const LowbitActivations& to, int64_t token, float* x, float* spare) {
  for (int64_t i = token * plan.limbs; i < (token + 1) * plan.limbs; ++i) {
    if (plan.limbs > 1) take_limb(x, spare, plan.padded_cols);
    const float* const row = plan.limbs > 1 ? spare : x;
    sum_groups(plan.call, row, to.sums + i * plan.call.groups);
    write_operands<uint8_t>(row, plan, to.row(i));
  }
}

#if defined(__AVX512BF16__)
bool serves_bf16(const LowbitLinearCall& call) {
  return !call.act_bits && call.x_type == DType::bf16 && has_whole_words(call);
}

void plan_bf16(LowbitPlan& plan) {
  plan.has_sums = plan.call.zero_point != nullptr;
  plan_operands<Bf16Pairs>(plan);
}

void prepare_bf16(const LowbitPlan& plan, const LowbitActivations& to, int64_t token, float* x, float*) {
  if (to.sums) sum_groups(plan.call, x, to.sums + token * plan.call.groups);
  write_operands<uint16_t>(x, plan, to.row(token));
}
#endif

}  // namespace

const LowbitKernel int8_kernel{serves_int8, plan_int8, prepare_int8, multiply<Int8Fours>};
#if defined(__AVX512BF16__)
const LowbitKernel bf16_kernel{serves_bf16, plan_bf16, prepare_bf16, multiply<Bf16Pairs>};
#endif
#endif

}  // namespace QK_ISA
}  // namespace qk
