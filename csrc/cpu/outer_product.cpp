// Products L^T R of bfloat16 matrices by tiles.
//
// Products add over tokens, which tiles want next to each other: two of them are an operand. All of L is rearranged
// into tiles first, in blocks of kOuterTokens. Each thread then takes some columns of the result, rearranges a block of
// tokens of those columns of R, and multiplies it with the same tokens of some rows of L. A block of both stays in the
// second cache level, and its part for 32 columns in the first. Sums are float32, in an order that depends on the
// number of tokens alone.
#include "outer_product.h"

#include <algorithm>
#include <memory>

#include "amx.h"
#include "elements.h"
#include "tiles.h"
#include "transpose.h"

namespace qk {
namespace QK_ISA {

#if defined(__AVX512VNNI__)
namespace {

constexpr int64_t kTileTokens = 2 * kTileOperands;
constexpr int64_t kBlockTiles = kOuterTokens / kTileTokens;  // of a block of tokens
constexpr int64_t kBlockRows = 512, kBlockPanels = 16;       // of the result, at most
static_assert(kOuterPanel == 2 * kTileRows);

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

// Writes the part of the result that a tile of sums is.
void write_sums(const OuterProduct& p, const float* sums, int64_t row, int64_t col) {
  const int64_t rows = std::min(kTileRows, p.rows - row), cols = std::min(kTileRows, p.cols - col);
  for (int64_t i = 0; i < rows && cols > 0; ++i) {
    bfloat16 lanes[kLanes];
    store(lanes, load(sums + 16 * i));
    std::memcpy(p.out + (row + i) * p.cols + col, lanes, static_cast<size_t>(cols) * sizeof(bfloat16));
  }
}

template <class Tiles>
void multiply(const OuterProduct& p, const char* prepared, int64_t begin, int64_t end) {
  const Factor right{p.right, p.tokens, p.cols};
  const int64_t tiles = token_tiles(p), lefts = left_tiles(p);
  constexpr int64_t sum_bytes = kBlockRows / kTileRows * kBlockPanels * 2 * kTileBytes;
  const std::unique_ptr<char[]> memory(new char[sum_bytes + kBlockTiles * kBlockPanels * 2 * kTileBytes + 64]);
  char* const sums = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t{63});
  char* const rearranged = sums + sum_bytes;  // [right tiles, tiles of tokens]
  Tiles multiplier(kTileOperands);
  for (int64_t panel = begin, panels; panel < end; panel += panels) {
    panels = std::min(kBlockPanels, end - panel);
    const int64_t rights = 2 * panels, first_col = panel * kOuterPanel;
    for (int64_t left = 0, count; left < lefts; left += count) {
      count = std::min(kBlockRows / kTileRows, lefts - left);
      for (int64_t tile = 0; tile < tiles; tile += kBlockTiles) {
        const int64_t n = std::min(kBlockTiles, tiles - tile);
        for (int64_t i = 0; i < n; ++i)
          for (int64_t r = 0; r < rights; ++r)
            right.write_tile<false>((tile + i) * kTileTokens, first_col + r * kTileRows,
                                    rearranged + (r * n + i) * kTileBytes);
        const char* const from = prepared + (tile * lefts + left * n) * kTileBytes;
        for (int64_t r = 0; r < rights; r += 2)
          for (int64_t l = 0; l < count; l += 2)
            add(multiplier, from + l * n * kTileBytes, rearranged + r * n * kTileBytes, n,
                {sums + (l * rights + r) * kTileBytes, rights * kTileBytes, kTileBytes}, tile == 0);
      }
      for (int64_t l = 0; l < count; ++l)
        for (int64_t r = 0; r < rights; ++r)
          write_sums(p, reinterpret_cast<const float*>(sums + (l * rights + r) * kTileBytes), (left + l) * kTileRows,
                     first_col + r * kTileRows);
    }
  }
}

}  // namespace

bool outer_serves() { return cpu::tiles() != cpu::Tiles::none; }
int64_t outer_buffer_bytes(const OuterProduct& p) { return token_tiles(p) * left_tiles(p) * kTileBytes; }

void outer_prepare(const OuterProduct& p, char* buffer, int64_t begin, int64_t end) {
  const Factor left{p.left, p.tokens, p.rows};
  const int64_t tiles = token_tiles(p), lefts = left_tiles(p);
  for (int64_t tile = begin * kBlockTiles; tile < std::min(tiles, end * kBlockTiles); tile += kBlockTiles) {
    const int64_t n = std::min(kBlockTiles, tiles - tile);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t l = 0; l < lefts; ++l)
        left.write_tile<true>((tile + i) * kTileTokens, l * kTileRows,
                              buffer + (tile * lefts + l * n + i) * kTileBytes);
  }
}

void outer_multiply(const OuterProduct& p, const char* buffer, int64_t begin, int64_t end) {
#if defined(QK_WITH_AMX)
  if (cpu::tiles() == cpu::Tiles::amx) return multiply<AmxTiles<Bf16Products>>(p, buffer, begin, end);
#endif
  multiply<PortableTiles<Bf16Products>>(p, buffer, begin, end);
}
#else
bool outer_serves() { return false; }
int64_t outer_buffer_bytes(const OuterProduct&) { return 0; }
void outer_prepare(const OuterProduct&, char*, int64_t, int64_t) {}
void outer_multiply(const OuterProduct&, const char*, int64_t, int64_t) {}
#endif

}  // namespace QK_ISA
}  // namespace qk
