// Products with packed weights in float32: any ISA, any number of tokens, any group size.
//
// Codes are decoded to float32 values, kColumns columns of a panel of rows at a time, which stay in the first cache
// level while all activation rows of the block are multiplied with them. To decode, the bytes of sixteen rows are
// transposed, so that a register holds one column: its lanes are rows of the weight, and sums need no addition across
// lanes.
//
// The products of kColumns columns are summed in a register, column after column, and this sum is added to the total.
// The order depends on the number of columns alone, so the bits do not depend on threads or on the number of tokens.
#include "lowbit_finish.h"
#include "lowbit_kernels.h"
#include "packed_codes.h"

namespace qk {
namespace QK_ISA {
namespace {

constexpr int64_t kColumns = 128;  // of a panel that are decoded at once: 16 KiB of float32
static_assert(kColumns % 128 == 0, "the codes of as many columns are whole 16 bytes for any number of bits");

// Where all activation rows of a block do not stay in the second cache level, kDepth columns of them do, while several
// panels are multiplied with them.
constexpr int64_t kDepth = 256, kDepthPanels = 8, kDepthActRows = 264;
constexpr int64_t kCacheBytes = 256 << 10;
static_assert(kDepth % kColumns == 0);

// A tile: activation rows whose sums for sixteen or 32 weight rows stay in registers, and the 16-lane vectors of sums
// that fit there.
#if defined(__AVX512F__)
constexpr int kTileActRows = 12, kTileVectors = 24;
#elif defined(__AVX2__)
constexpr int kTileActRows = 6, kTileVectors = 6;
#elif defined(__aarch64__)
constexpr int kTileActRows = 6, kTileVectors = 6;
#else
constexpr int kTileActRows = 3, kTileVectors = 3;
#endif

using Bytes = Register<uint8_t, 16>;

// Byte j of row i to byte i of row j.
QK_INLINE void transpose(Bytes (&rows)[16]) {
  constexpr std::make_index_sequence<16> lanes{};
  for (int pass = 0; pass < 4; ++pass) {
    Bytes shuffled[16];
    for (int i = 0; i < 8; ++i) {
      shuffled[2 * i] = interleave_low(rows[i], rows[i + 8], lanes);
      shuffled[2 * i + 1] = interleave_high(rows[i], rows[i + 8], lanes);
    }
    for (int i = 0; i < 16; ++i) rows[i] = shuffled[i];
  }
}

// Converts the codes of sixteen rows in one group into values: (code + offset) * scale.
struct GroupFactors {
  F32 offset, scale;

  __attribute__((noinline)) GroupFactors(const LowbitLinearCall& call, int64_t first_row, int64_t rows, int64_t group) {
    alignas(64) float offsets[kLanes] = {}, scales[kLanes] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (first_row + r) * call.groups + group;
      scales[r] = read_float(call.scale, call.scale_type, at);
      offsets[r] = static_cast<float>(call.offset) - (call.zero_point ? call.zero_point[at] : 0.0f);
    }
    offset = load(offsets);
    scale = load(scales);
    const F32 min_scale(static_cast<float>(kMinScale));
    scale = select(scale < min_scale, min_scale, scale) / F32(static_cast<float>(call.steps));  // NaN stays
  }
};

// Code `Index` of eight, whose bytes are in `Bits` registers: it lies in one byte of its row or in two neighbours.
template <int Bits, int Index>
QK_INLINE U32 code_at(const Bytes* eight) {
  constexpr int byte = Index * Bits / 8, shift = Index * Bits % 8;
  U32 code = bytes_to_uint(eight[byte]);
  if constexpr (shift + Bits > 8) code = code | bytes_to_uint(eight[byte + 1]) << 8;
  if constexpr (shift > 0) code = code >> shift;
  if constexpr (shift + Bits != 8) code = code & U32((1u << Bits) - 1);
  return code;
}

template <class F, int... I>
QK_INLINE void for_constants(std::integer_sequence<int, I...>, F f) {
  (f(std::integral_constant<int, I>()), ...);
}

// The packed bytes of up to sixteen rows, `bytes` of each, transposed: byte column j of all rows in columns[j].
template <int Bits>
QK_INLINE void read_columns(const uint8_t* packed, int64_t stride, int64_t rows, int64_t bytes,
                            Bytes (&columns)[kColumns / 8 * Bits]) {
  for (int64_t at = 0; at < bytes; at += 16) {
    Bytes part[16];
    if (rows == 16 && at + 16 <= bytes) {
#pragma GCC unroll 16
      for (int64_t r = 0; r < 16; ++r) std::memcpy(&part[r], packed + r * stride + at, 16);
    } else {
      std::memset(part, 0, sizeof part);
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(&part[r], packed + r * stride + at, static_cast<size_t>(std::min<int64_t>(16, bytes - at)));
    }
    transpose(part);
    std::memcpy(columns + at, part, sizeof part);
  }
}

// Writes columns [first, first + n) of up to sixteen rows as values, a column every kPanel floats. `first` is a
// multiple of kColumns.
template <int Bits>
__attribute__((noinline)) void decode(const LowbitLinearCall& call, int64_t first_row, int64_t rows, int64_t first,
                                      int64_t n, float* out) {
  const int64_t stride = row_bytes(call.cols, Bits), group_cols = call.cols / call.groups;
  const uint8_t* const packed = call.packed + first_row * stride + first / 8 * Bits;
  Bytes columns[kColumns / 8 * Bits];
  read_columns<Bits>(packed, stride, rows, row_bytes(n, Bits), columns);
  for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(packed + r * stride + kColumns / 8 * Bits);
  constexpr std::make_integer_sequence<int, 8> eight{};
  const F32 low(static_cast<float>(call.code_min));
  int64_t group = first / group_cols, left = (group + 1) * group_cols - first;  // columns of the group yet to come
  GroupFactors factors(call, first_row, rows, group);
  const auto next_group = [&] {
    factors = GroupFactors(call, first_row, rows, ++group);
    left = group_cols;
  };
  for (int64_t column = 0; column < n; column += 8) {
    const Bytes* const from = columns + column / 8 * Bits;
    const auto put = [&](auto i) QK_INLINE_LAMBDA {
      const F32 code = to_float(code_at<Bits, i>(from)) + low;
      store(out + (column + i) * kPanel, (code + factors.offset) * factors.scale);
    };
    if (left == 0) next_group();
    if (left >= 8 && column + 8 <= n) {
      for_constants(eight, put);
      left -= 8;
      continue;
    }
    for_constants(eight, [&](auto i) {
      if (column + i >= n) return;
      if (left == 0) next_group();
      put(i);
      --left;
    });
  }
}

// sums[t] += x[t] times the panel, for `ActRows` activation rows t that are `stride` floats apart.
template <int ActRows>
void multiply_tile(const float* panel, int64_t columns, const float* x, int64_t stride, float* sums) {
  constexpr int kVectors = 2 * ActRows <= kTileVectors ? 2 : 1;
  for (int64_t row = 0; row < kPanel; row += kVectors * kLanes) {
    F32 acc[ActRows][kVectors];
#pragma GCC unroll 12
    for (int t = 0; t < ActRows; ++t)
      for (int v = 0; v < kVectors; ++v) acc[t][v] = F32(0.0f);
    const float* w = panel + row;
    for (int64_t i = 0; i < columns; ++i, w += kPanel) {
#pragma GCC unroll 12
      for (int t = 0; t < ActRows; ++t) {
        const F32 factor(x[t * stride + i]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) acc[t][v] = multiply_add(load(w + v * kLanes), factor, acc[t][v]);
      }
    }
#pragma GCC unroll 12
    for (int t = 0; t < ActRows; ++t)
      for (int v = 0; v < kVectors; ++v) {
        float* const to = sums + t * kPanel + row + v * kLanes;
        store(to, load(to) + acc[t][v]);
      }
  }
}

// All activation rows of a block, tile by tile. The last two tiles share their rows where the last would be small.
template <int... Less>
void multiply_tiles(std::integer_sequence<int, Less...>, const float* panel, int64_t columns, const float* x,
                    int64_t stride, int64_t act_rows, float* sums) {
  constexpr decltype(&multiply_tile<1>) of_size[] = {multiply_tile<Less + 1>...};
  for (int64_t i = 0, n; i < act_rows; i += n) {
    const int64_t left = act_rows - i;
    n = left > kTileActRows && left < kTileActRows + kTileActRows / 2 ? (left + 1) / 2
                                                                      : std::min<int64_t>(kTileActRows, left);
    of_size[n - 1](panel, columns, x + i * stride, stride, sums + i * kPanel);
  }
}

bool serves(const LowbitLinearCall&) { return true; }

void plan_float(LowbitPlan& plan) {
  plan.padded_cols = round_up(plan.call.cols, kLanes);
  plan.operand_bytes = plan.padded_cols * static_cast<int64_t>(sizeof(float));
  plan.block_act_rows = std::min(kDepthActRows, plan.act_rows());
  // Few activation rows stay in the cache for one panel after the other, and each weight row is then read to its end.
  if (plan.block_act_rows * plan.operand_bytes > kCacheBytes) plan.block_panels = kDepthPanels;
}

void prepare(const LowbitPlan& plan, const LowbitActivations& to, int64_t token, float* x, float*) {
  std::memcpy(to.row(token), x, plan.padded_cols * sizeof(float));
}

void multiply(const LowbitBlock& b, float* sums, void*) {
  const int64_t stride = b.x.stride / static_cast<int64_t>(sizeof(float)), cols = b.plan.call.cols;
  const float* const x = reinterpret_cast<const float*>(b.x.row(b.first_act_row));
  alignas(64) float panel[kColumns * kPanel];
  std::memset(panel, 0, sizeof panel);  // the rows that a last panel lacks stay zero
  std::memset(sums, 0, static_cast<size_t>(round_up(b.rows, kPanel) * b.act_rows) * sizeof(float));
  with_bits(b.plan.call.bits, [&](auto bits) {
    for (int64_t start = 0; start < cols; start += kDepth)
      for (int64_t row = 0; row < b.rows; row += kPanel) {
        const int64_t rows = std::min(kPanel, b.rows - row), last = std::min(start + kDepth, cols);
        for (int64_t first = start; first < last; first += kColumns) {
          const int64_t n = std::min(kColumns, last - first);
          for (int64_t half = 0; half < rows; half += kLanes)
            decode<bits>(b.plan.call, b.first_row + row + half, std::min<int64_t>(kLanes, rows - half), first, n,
                         panel + half);
          multiply_tiles(std::make_integer_sequence<int, kTileActRows>(), panel, n, x + first, stride, b.act_rows,
                         sums + row * b.act_rows);
        }
      }
  });
  finish_panels(b, sums);
}

}  // namespace

const LowbitKernel float_kernel{serves, plan_float, prepare, multiply};

}  // namespace QK_ISA
}  // namespace qk
