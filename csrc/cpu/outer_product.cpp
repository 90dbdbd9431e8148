// The gradient of a quantized weight by tiles.
//
// Products add over tokens, which tiles want next to each other: two of them are an operand. All of G is rearranged
// into tiles first, in blocks of kOuterTokens. Each thread then takes a unit of the weight at a time, kOuterRows by
// kOuterCols. It rearranges a block of tokens of the unit's columns of X, and multiplies them with the same tokens of
// the unit's rows of G. A block of both stays in the second cache level, and its part for 32 columns in the first. The
// order of all sums depends on shapes alone, so results are the same bits for any number of threads.
#include "outer_product.h"

#include <algorithm>
#include <memory>

#include "amx.h"
#include "divide.h"
#include "rows.h"
#include "tiles.h"
#include "transpose.h"

namespace qk {
namespace QK_ISA {

#if defined(__AVX512VNNI__)
namespace {

constexpr int64_t kTileTokens = 2 * kTileOperands;
constexpr int64_t kBlockTiles = kOuterTokens / kTileTokens;                           // of a block of tokens
constexpr int64_t kLefts = kOuterRows / kTileRows, kRights = kOuterCols / kTileRows;  // tiles of a unit

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A factor in memory, [tokens, rows] or [tokens, cols].
struct Factor {
  const uint16_t* data;
  int64_t tokens, width;

  // Writes the tile of sixteen columns from `first` on. Tokens and columns that are not there become zeros. The
  // operands of a left tile are in rows, those of a right tile go down.
  template <bool Left>
  QK_INLINE void write_tile(int64_t token, int64_t first, char* to) const {
    const int64_t columns = width - first;
    const auto valid = static_cast<__mmask16>(columns >= 16 ? 0xFFFF : (1u << std::max<int64_t>(columns, 0)) - 1);
    const auto row = [&](int64_t t) QK_INLINE_LAMBDA {
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(t < tokens ? valid : 0, data + t * width + first));
    };
    __m512i t[16];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTileOperands; ++i)
      t[i] = _mm512_or_si512(row(token + 2 * i), _mm512_slli_epi32(row(token + 2 * i + 1), 16));
    if constexpr (Left) transpose(t);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(to + 64 * i, t[i]);
  }
};

int64_t token_tiles(const OuterProduct& p) { return divide_up(p.tokens, kTileTokens); }
int64_t left_tiles(const OuterProduct& p) { return divide_up(p.rows, 2 * kTileRows) * 2; }

// Adds the products of a block of tokens, `count` tiles long, to four tiles of sums.
template <class Tiles>
QK_INLINE void add(Tiles& tiles, const char* left, const char* right, int64_t count, const SumsAt& at, bool first) {
  const auto multiply = [&](auto n) QK_INLINE_LAMBDA {
    first ? tiles.template zero<2>() : tiles.template load<2>(at);
    for (int64_t i = 0; i < n; ++i)
      tiles.template multiply<2>({left + i * kTileBytes, n * kTileBytes}, {right + i * kTileBytes, n * kTileBytes});
    tiles.template store<2>(at);
  };
  count == kBlockTiles ? multiply(std::integral_constant<int64_t, kBlockTiles>()) : multiply(count);
}

// Whether a unit has a part of a scale's elements, in each of its rows. Otherwise it has whole groups.
bool has_parts(const OuterProduct& p) {
  return p.backward.args.cols % kOuterCols == 0 || p.backward.args.cols >= p.cols;
}

// The backward of the quantization for some columns of a row, from the gradients of their values: sixteen floats in
// each tile of sums.
template <class T, class W>
void backward_row(const OuterProduct& p, const Grid<T>& grid, int64_t row, int64_t part, const float* sums,
                  double* partial) {
  const FakeQuantizeBackwardCall& call = p.backward;
  const QuantArgs& args = call.args;
  const int64_t first = part * kOuterCols, last = std::min(first + kOuterCols, p.cols);
  const bool parts = has_parts(p), streaming = streams(static_cast<W*>(call.dw), Units(p.rows, p.cols));
  for (int64_t col = first, end; col < last; col = end) {
    const int64_t at = row * p.cols + col, of = at / args.cols;
    end = parts ? last : col + args.cols;
    const T zero = call.dz ? static_cast<T>(read_scale(args.zero_point, args.scale_type, of)) : T(0);
    const RowGrid<T> rule(grid, static_cast<T>(read_scale(args.scale, args.scale_type, of)), zero);
    const Divisor<T> scale(rule.scale);
    const W* const w = static_cast<const W*>(args.w) + at;
    W* const dw = static_cast<W*>(call.dw) + at;
    Vec<T> sum_s(T(0)), sum_z(T(0));
    for_lanes(end - col, [&](int64_t i, auto count) QK_INLINE_LAMBDA {
      // Lanes beyond the columns may be NaN, where an infinite gradient met a zero.
      const Vec<T> upstream = get(sums + (col - first + i) * kTileRows, count);
      const Vec<T> lanes = get(w + i, count);
      const Slopes<Vec<T>, T> slopes(lanes, scale.template divide<true>(lanes), rule);
      put<Rounded>(dw + i, slopes.masked(upstream), count, streaming);
      sum_s = sum_s + upstream * slopes.scale;
      if (call.dz) sum_z = sum_z + upstream * slopes.zero_point;
    });
    if (parts) {
      double* const to = partial + 2 * (row * p.parts() + part);
      to[0] = sum(sum_s);
      to[1] = sum(sum_z);
    } else {
      write_scale(call.ds, args.scale_type, of, sum(sum_s) * args.grad_scale);
      if (call.dz) write_scale(call.dz, args.scale_type, of, sum(sum_z) * args.grad_scale);
    }
  }
}

template <class Tiles>
void multiply(const OuterProduct& p, const char* prepared, double* partial, int64_t begin, int64_t end) {
  const Factor right{p.x, p.tokens, p.cols};
  const int64_t tiles = token_tiles(p), all_left = left_tiles(p);
  const Grid<float> grid = p.backward.args.grid.as<float>();
  constexpr int64_t sum_bytes = kLefts * kRights * kTileBytes;
  const std::unique_ptr<char[]> memory(new char[sum_bytes + kBlockTiles * kRights * kTileBytes + 64]);
  char* const sums = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t{63});
  char* const rearranged = sums + sum_bytes;  // [right tiles, tiles of tokens]
  Tiles multiplier(kTileOperands);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t left = unit / p.parts() * kLefts, part = unit % p.parts();
    const int64_t lefts = std::min(kLefts, all_left - left);
    const int64_t rights = std::min(kRights, divide_up(p.cols - part * kOuterCols, 2 * kTileRows) * 2);
    for (int64_t tile = 0; tile < tiles; tile += kBlockTiles) {
      const int64_t n = std::min(kBlockTiles, tiles - tile);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t r = 0; r < rights; ++r)
          right.write_tile<false>((tile + i) * kTileTokens, part * kOuterCols + r * kTileRows,
                                  rearranged + (r * n + i) * kTileBytes);
      const char* const from = prepared + (tile * all_left + left * n) * kTileBytes;
      for (int64_t r = 0; r < rights; r += 2)
        for (int64_t l = 0; l < lefts; l += 2)
          add(multiplier, from + l * n * kTileBytes, rearranged + r * n * kTileBytes, n,
              {sums + (l * kRights + r) * kTileBytes, kRights * kTileBytes, kTileBytes}, tile == 0);
    }
    const int64_t first = left * kTileRows, last = std::min(first + kOuterRows, p.rows);
    const auto backward = [&](auto w) {
      for (int64_t row = first; row < last; ++row) {
        const char* const of_row = sums + (row - first) / kTileRows * kRights * kTileBytes + row % kTileRows * 64;
        backward_row<float, decltype(w)>(p, grid, row, part, reinterpret_cast<const float*>(of_row), partial);
      }
    };
    p.backward.args.w_type == DType::bf16 ? backward(bfloat16()) : backward(float());
  }
  stream_fence();
}

bool serves(const OuterProduct& p) {
  const QuantArgs& args = p.backward.args;
  const int64_t group = args.cols;
  return cpu::tiles() != cpu::Tiles::none && !args.seed && (args.w_type == DType::bf16 || args.w_type == DType::f32) &&
         (group % p.cols == 0 ||
          (p.cols % group == 0 && (group % kOuterCols == 0 || (kOuterCols % group == 0 && group % kTileRows == 0))));
}

int64_t buffer_bytes(const OuterProduct& p) { return token_tiles(p) * left_tiles(p) * kTileBytes; }

void prepare(const OuterProduct& p, char* buffer, int64_t begin, int64_t end) {
  const Factor left{p.g, p.tokens, p.rows};
  const int64_t tiles = token_tiles(p), lefts = left_tiles(p);
  for (int64_t tile = begin * kBlockTiles; tile < std::min(tiles, end * kBlockTiles); tile += kBlockTiles) {
    const int64_t n = std::min(kBlockTiles, tiles - tile);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t l = 0; l < lefts; ++l)
        left.write_tile<true>((tile + i) * kTileTokens, l * kTileRows,
                              buffer + (tile * lefts + l * n + i) * kTileBytes);
  }
}

void finish(const OuterProduct& p, const double* partial) {
  const FakeQuantizeBackwardCall& call = p.backward;
  if (!has_parts(p)) return;
  for (int64_t of = 0, at = 0; of < call.args.rows; ++of) {
    double s = 0, z = 0;
    for (const int64_t end = (of + 1) * call.args.cols; at < end;) {
      const int64_t row = at / p.cols, part = at % p.cols / kOuterCols;
      s += partial[2 * (row * p.parts() + part)];
      z += partial[2 * (row * p.parts() + part) + 1];
      at = row * p.cols + std::min((part + 1) * kOuterCols, p.cols);
    }
    write_scale(call.ds, call.args.scale_type, of, s * call.args.grad_scale);
    if (call.dz) write_scale(call.dz, call.args.scale_type, of, z * call.args.grad_scale);
  }
}

template <class Tiles>
constexpr OuterKernel kKernel{buffer_bytes, prepare, multiply<Tiles>, finish};

}  // namespace

const OuterKernel* outer_kernel(const OuterProduct& p) {
  if (!serves(p)) return nullptr;
#if defined(QK_WITH_AMX)
  if (cpu::tiles() == cpu::Tiles::amx) return &kKernel<AmxTiles<Bf16Products>>;
#endif
  return &kKernel<PortableTiles<Bf16Products>>;
}
#else
const OuterKernel* outer_kernel(const OuterProduct&) { return nullptr; }
#endif

}  // namespace QK_ISA
}  // namespace qk
