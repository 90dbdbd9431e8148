// Products with packed weights in float32: any ISA, any number of tokens.
//
// A panel of rows is decoded a few columns at a time into numbers that stay in the first cache level, and every line of
// activations meets them there. To decode, the bytes of sixteen rows are transposed, so that a register holds one
// column of the rows; sums then have a row in each lane, and no lanes have to be added.
//
// A sum adds its products column after column, kColumns of them in a register, and then those to the sum before. That
// order depends on the number of columns alone: not on threads, and not on how many lines there are.
#include "lowbit.h"

namespace qk {
namespace QK_ISA {
namespace {

constexpr int64_t kColumns = 128;  // of a panel that are decoded at once: 16 KiB of numbers
constexpr int64_t kDepth = 256;    // columns of all lines that meet several panels from the second cache level
static_assert(kDepth % kColumns == 0 && kColumns % 128 == 0, "codes of as many columns are whole blocks of bytes");

// Lines whose sums for sixteen rows (or 32) stay in registers, and the 16-lane vectors that fit there.
#if defined(__AVX512F__)
constexpr int kTileLines = 12, kTileVectors = 24;
#elif defined(__AVX2__)
constexpr int kTileLines = 6, kTileVectors = 6;
#elif defined(__aarch64__)
constexpr int kTileLines = 6, kTileVectors = 6;
#else
constexpr int kTileLines = 3, kTileVectors = 3;
#endif

using Bytes = Register<uint8_t, 16>;

// Byte j of row i to byte i of row j.
QK_HD void transpose(Bytes (&rows)[16]) {
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

// What makes numbers of the codes of sixteen rows in one group: (code + offset) * scale.
struct Factors {
  F32 offset, scale;

  __attribute__((noinline)) Factors(const LowbitLinearCall& call, int64_t first_row, int64_t rows, int64_t group) {
    alignas(64) float offsets[kLanes] = {}, scales[kLanes] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (first_row + r) * call.groups + group;
      scales[r] = read_float(call.scale, call.scale_type, at);
      offsets[r] = static_cast<float>(call.offset) - (call.zero_point ? call.zero_point[at] : 0.0f);
    }
    offset = load(offsets);
    scale = load(scales);
    const F32 least(static_cast<float>(kMinScale));
    scale = select(scale < least, least, scale) / F32(static_cast<float>(call.steps));  // NaN stays
  }
};

// Code `Index` of eight, of which `Bits` registers hold the bytes: it lies in one byte of its row or in two neighbours.
template <int Bits, int Index>
QK_HD U32 code_at(const Bytes* eight) {
  constexpr int byte = Index * Bits / 8, shift = Index * Bits % 8;
  U32 code = bytes_to_uint(eight[byte]);
  if constexpr (shift + Bits > 8) code = code | bytes_to_uint(eight[byte + 1]) << 8;
  if constexpr (shift > 0) code = code >> shift;
  if constexpr (shift + Bits != 8) code = code & U32((1u << Bits) - 1);
  return code;
}

template <class F, int... I>
QK_HD void for_constants(std::integer_sequence<int, I...>, F f) {
  (f(std::integral_constant<int, I>()), ...);
}

// Columns [first, first + n) of up to sixteen rows as numbers, a column every kPanel floats; first is a multiple of
// kColumns.
template <int Bits>
__attribute__((noinline)) void decode(const LowbitLinearCall& call, int64_t first_row, int64_t rows, int64_t first,
                                      int64_t n, float* out) {
  const int64_t stride = row_bytes(call.cols, Bits), bytes = row_bytes(n, Bits), size = call.cols / call.groups;
  const uint8_t* const packed = call.packed + first_row * stride + first / 8 * Bits;
  Bytes columns[kColumns / 8 * Bits];  // of bytes
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
  for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(packed + r * stride + kColumns / 8 * Bits);
  constexpr std::make_integer_sequence<int, 8> eight{};
  const F32 low(static_cast<float>(call.code_min));
  int64_t group = first / size, left = (group + 1) * size - first;  // columns of the group that are still to come
  Factors factors(call, first_row, rows, group);
  const auto next_group = [&] {
    factors = Factors(call, first_row, rows, ++group);
    left = size;
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

// sums[line] += x[line] times the panel, for `Lines` lines that are `stride` floats apart.
template <int Lines>
void multiply_tile(const float* panel, int64_t columns, const float* x, int64_t stride, float* sums) {
  constexpr int kVectors = 2 * Lines <= kTileVectors ? 2 : 1;
  for (int64_t row = 0; row < kPanel; row += kVectors * kLanes) {
    F32 acc[Lines][kVectors];
#pragma GCC unroll 12
    for (int t = 0; t < Lines; ++t)
      for (int v = 0; v < kVectors; ++v) acc[t][v] = F32(0.0f);
    const float* w = panel + row;
    for (int64_t i = 0; i < columns; ++i, w += kPanel) {
#pragma GCC unroll 12
      for (int t = 0; t < Lines; ++t) {
        const F32 factor(x[t * stride + i]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) acc[t][v] = multiply_add(load(w + v * kLanes), factor, acc[t][v]);
      }
    }
#pragma GCC unroll 12
    for (int t = 0; t < Lines; ++t)
      for (int v = 0; v < kVectors; ++v) {
        float* const to = sums + t * kPanel + row + v * kLanes;
        store(to, load(to) + acc[t][v]);
      }
  }
}

// All lines, tile by tile. The last two share what would leave little for one.
template <int... Less>
void multiply_tiles(std::integer_sequence<int, Less...>, const float* panel, int64_t columns, const float* x,
                    int64_t stride, int64_t lines, float* sums) {
  constexpr decltype(&multiply_tile<1>) of_size[] = {multiply_tile<Less + 1>...};
  for (int64_t line = 0, n; line < lines; line += n) {
    const int64_t left = lines - line;
    n = left > kTileLines && left < kTileLines + kTileLines / 2 ? (left + 1) / 2 : std::min<int64_t>(kTileLines, left);
    of_size[n - 1](panel, columns, x + line * stride, stride, sums + line * kPanel);
  }
}

}  // namespace

void multiply_float(const RowBlock& b, float* sums, void*) {
  const int64_t stride = b.activations.stride() / 4, cols = b.call.cols;
  const float* const x = reinterpret_cast<const float*>(b.activations.line(b.first_line));
  alignas(64) float panel[kColumns * kPanel];
  std::memset(panel, 0, sizeof panel);  // a panel of few rows leaves the others so
  std::memset(sums, 0, static_cast<size_t>((b.rows + kPanel - 1) / kPanel * b.lines * kPanel * 4));
  with_bits(b.call.bits, [&](auto bits) {
    for (int64_t start = 0; start < cols; start += kDepth)
      for (int64_t row = 0; row < b.rows; row += kPanel) {
        const int64_t rows = std::min(kPanel, b.rows - row), last = std::min(start + kDepth, cols);
        for (int64_t first = start; first < last; first += kColumns) {
          const int64_t n = std::min(kColumns, last - first);
          for (int64_t half = 0; half < rows; half += kLanes)
            decode<bits>(b.call, b.first_row + row + half, std::min<int64_t>(kLanes, rows - half), first, n,
                         panel + half);
          multiply_tiles(std::make_integer_sequence<int, kTileLines>(), panel, n, x + first, stride, b.lines,
                         sums + row * b.lines);
        }
      }
  });
}

}  // namespace QK_ISA
}  // namespace qk
