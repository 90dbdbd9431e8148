// Products of tiles: sixteen rows times sixteen columns, many products in one instruction of AMX.
//
// A tile of the left factor is sixteen rows of 64 bytes along the columns that are summed over. A tile of the right
// factor has the same columns down, four bytes of them (an operand: two bfloat16 or four int8) to each of sixteen
// right-hand rows. Sums are sixteen by sixteen, a row for each row on the left. Two times two tiles of sums are kept:
//
//                        right rows 0-15   16-31
//                             tmm6          tmm7
//     left rows  0-15  tmm4   tmm0          tmm1
//               16-31  tmm5   tmm2          tmm3
//
// A tile is 1024 bytes in a row in memory. PortableTiles does the same with loops. Tests run the code around tiles with
// it on machines without AMX.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd.h"

#if defined(__AVX512VNNI__)
namespace qk {
namespace QK_ISA {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileOperands = 16;  // of a whole tile, down its columns; half tiles have eight

// What an instruction does in one lane: adds the products of an operand. Sums are 32 bits, whatever their type.
struct Bf16Products {
  using Element = uint16_t;
  using Sum = float;
  static float add(float sum, const char* left, const char* right) {
    const auto element = [](const char* from, int i) {
      float v;
      uint16_t upper[2] = {0, 0};
      std::memcpy(&upper[1], from + 2 * i, 2);
      std::memcpy(&v, upper, 4);
      return v;
    };
    for (int i = 0; i < 2; ++i) sum += element(left, i) * element(right, i);
    return sum;
  }
};
struct Int8Products {
  using Element = uint8_t;
  using Sum = int32_t;
  static int32_t add(int32_t sum, const char* left, const char* right) {
    for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(left[i]) * static_cast<int8_t>(right[i]);
    return sum;
  }
};

// Where the tiles of sums, or of factors, lie: those of the second sixteen left rows, and of right rows, follow at a
// distance in bytes.
struct SumsAt {
  char* first;
  int64_t next_left, next_right;

  char* of(int left, int right) const { return first + left * next_left + right * next_right; }
};
struct FactorAt {
  const char* first;
  int64_t next;
};

#if defined(QK_WITH_AMX)
// A macro, because the intrinsics write the numbers of tiles into assembly.
#define QK_TILE_DOT(sum, left, right)                   \
  if constexpr (std::is_same_v<Products, Int8Products>) \
    _tile_dpbssd(sum, left, right);                     \
  else                                                  \
    _tile_dpbf16ps(sum, left, right)

template <class Products>
class AmxTiles {
 public:
  // Sets the sizes of tiles: `operands` of a step, sixteen or eight.
  explicit AmxTiles(int64_t operands) {
    Configuration sizes{};
    for (int tile = 0; tile < 8; ++tile) sizes.rows[tile] = 16, sizes.bytes[tile] = 64;
    for (const int left : {4, 5}) sizes.bytes[left] = static_cast<uint16_t>(4 * operands);
    for (const int right : {6, 7}) sizes.rows[right] = static_cast<uint8_t>(operands);
    // The intrinsic tells the compiler that it reads eight bytes: without this the other sizes need not be written.
    asm volatile("" ::"m"(sizes), "r"(&sizes) : "memory");
    _tile_loadconfig(&sizes);
  }
  AmxTiles(const AmxTiles&) = delete;
  ~AmxTiles() { _tile_release(); }

  template <int Right>
  QK_INLINE void zero() {
    _tile_zero(0);
    _tile_zero(2);
    if constexpr (Right == 1) return;
    _tile_zero(1);
    _tile_zero(3);
  }
  template <int Right>
  QK_INLINE void load(const SumsAt& at) {
    asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler that they read memory
    _tile_loadd(0, at.of(0, 0), 64);
    _tile_loadd(2, at.of(1, 0), 64);
    if constexpr (Right == 1) return;
    _tile_loadd(1, at.of(0, 1), 64);
    _tile_loadd(3, at.of(1, 1), 64);
  }
  template <int Right>
  QK_INLINE void store(const SumsAt& at) {
    _tile_stored(0, at.of(0, 0), 64);
    _tile_stored(2, at.of(1, 0), 64);
    if constexpr (Right == 2) {
      _tile_stored(1, at.of(0, 1), 64);
      _tile_stored(3, at.of(1, 1), 64);
    }
    asm volatile("" ::: "memory");  // nor that they write it
  }
  // Adds the products of a step's operands.
  template <int Right>
  QK_INLINE void multiply(const FactorAt& left, const FactorAt& right) {
    asm volatile("" ::: "memory");
    _tile_loadd(6, right.first, 64);
    _tile_loadd(4, left.first, 64);
    QK_TILE_DOT(0, 4, 6);
    _tile_loadd(5, left.first + left.next, 64);
    QK_TILE_DOT(2, 5, 6);
    if constexpr (Right == 1) return;
    _tile_loadd(7, right.first + right.next, 64);
    QK_TILE_DOT(1, 4, 7);
    QK_TILE_DOT(3, 5, 7);
  }

 private:
  struct Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Configuration) == 64);
};
#undef QK_TILE_DOT
#endif

template <class Products>
class PortableTiles {
 public:
  explicit PortableTiles(int64_t operands) : operands_(operands) {}

  template <int Right>
  void zero() {
    std::memset(sums_, 0, sizeof sums_);
  }
  template <int Right>
  void load(const SumsAt& at) {
    for (int left = 0; left < 2; ++left)
      for (int right = 0; right < Right; ++right) std::memcpy(sums_[left][right], at.of(left, right), kTileBytes);
  }
  template <int Right>
  void store(const SumsAt& at) const {
    for (int left = 0; left < 2; ++left)
      for (int right = 0; right < Right; ++right) std::memcpy(at.of(left, right), sums_[left][right], kTileBytes);
  }
  template <int Right>
  void multiply(const FactorAt& left, const FactorAt& right) {
    for (int l = 0; l < 2; ++l)
      for (int r = 0; r < Right; ++r) add(sums_[l][r], left.first + l * left.next, right.first + r * right.next);
  }

 private:
  void add(typename Products::Sum (&sums)[16][16], const char* left, const char* right) const {
    for (int row = 0; row < 16; ++row)
      for (int64_t i = 0; i < operands_; ++i)
        for (int column = 0; column < 16; ++column)
          sums[row][column] = Products::add(sums[row][column], left + row * 64 + 4 * i, right + i * 64 + 4 * column);
  }

  int64_t operands_;
  typename Products::Sum sums_[2][2][16][16];
};

}  // namespace QK_ISA
}  // namespace qk
#endif
