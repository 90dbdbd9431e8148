// Products of tiles: sixteen activation rows times sixteen weight rows, many products in one instruction of AMX.
//
// A tile of activations is sixteen rows of up to sixteen operands (lowbit_operands.h), a tile of weights as many
// operands of sixteen weight rows, and a tile of sums sixteen by sixteen. That is how multiply_many lays out both, so
// that nothing is rearranged. Two times two tiles of sums are kept, for thirty-two activation rows and a panel:
//
//                       weight rows 0-15    16-31
//                            tmm6            tmm7
//     act rows  0-15  tmm4   tmm0            tmm1
//              16-31  tmm5   tmm2            tmm3
//
// PortableTiles does the same with loops. Tests run the code around tiles with it on machines without AMX.
#pragma once

#include "lowbit_operands.h"

#if defined(QK_LOWBIT_VNNI)
namespace qk {
namespace QK_ISA {

constexpr int64_t kTileRows = 16;

// The sums of a step of tiles, [activation rows, panel], as Mac::Sum has them.
struct alignas(64) TileSums {
  int32_t of[2 * kTileRows][kPanel];
};

#if defined(QK_WITH_AMX)
template <class Mac>
class AmxTiles {
 public:
  AmxTiles() = default;
  AmxTiles(const AmxTiles&) = delete;
  ~AmxTiles() { _tile_release(); }

  // Sets the sizes of tiles: `rows` activation rows, at most 32, and `operands` of a step, at most 16.
  void configure(int64_t rows, int64_t operands) {
    if (rows == rows_ && operands == operands_) return;
    rows_ = rows, operands_ = operands;
    Configuration sizes{};
    const int64_t first = std::min(rows, kTileRows), second = rows - first;
    const auto set = [&sizes](int tile, int64_t of_rows, int64_t bytes) {
      sizes.rows[tile] = static_cast<uint8_t>(of_rows);
      sizes.bytes[tile] = static_cast<uint16_t>(of_rows ? bytes : 0);
    };
    for (const int tile : {0, 1}) set(tile, first, 64);
    for (const int tile : {2, 3}) set(tile, second, 64);
    set(4, first, 4 * operands);
    set(5, second, 4 * operands);
    for (const int tile : {6, 7}) set(tile, operands, 64);
    // The intrinsic tells the compiler that it reads eight bytes: without this the other sizes need not be written.
    asm volatile("" ::"m"(sizes), "r"(&sizes) : "memory");
    _tile_loadconfig(&sizes);
  }
  QK_INLINE void zero() {
    _tile_zero(0);
    _tile_zero(1);
    if (rows_ <= kTileRows) return;
    _tile_zero(2);
    _tile_zero(3);
  }
  // Adds the products of a step's operands. x: of activation rows that are `stride` bytes apart; w: [operands, 2
  // halves].
  QK_INLINE void multiply(const char* x, int64_t stride, const __m512i* w) {
    asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler that they read memory
    _tile_loadd(6, w, 128);
    _tile_loadd(7, w + 1, 128);
    _tile_loadd(4, x, stride);
    dot<0>();
    if (rows_ <= kTileRows) return;
    _tile_loadd(5, x + kTileRows * stride, stride);
    dot<1>();
  }
  QK_INLINE void store(TileSums& to) {
    constexpr int64_t stride = kPanel * 4;
    _tile_stored(0, to.of, stride);
    _tile_stored(1, to.of[0] + kTileRows, stride);
    if (rows_ > kTileRows) {
      _tile_stored(2, to.of[kTileRows], stride);
      _tile_stored(3, to.of[kTileRows] + kTileRows, stride);
    }
    asm volatile("" ::: "memory");  // nor that they write it
  }

 private:
  struct Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Configuration) == 64);

  template <int Half>
  static QK_INLINE void dot() {
    if constexpr (std::is_same_v<typename Mac::Element, uint8_t>) {
      if constexpr (Half == 0) {
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
      } else {
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
    } else if constexpr (Half == 0) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    } else {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  int64_t rows_ = 0, operands_ = 0;
};
#endif

template <class Mac>
class PortableTiles {
 public:
  void configure(int64_t rows, int64_t operands) { rows_ = rows, operands_ = operands; }
  void zero() { sums_ = TileSums{}; }
  void multiply(const char* x, int64_t stride, const __m512i* w) {
    for (int64_t t = 0; t < rows_; ++t)
      for (int64_t i = 0; i < operands_; ++i)
        for (int64_t r = 0; r < kPanel; ++r)
          sums_.of[t][r] = Mac::add_products(sums_.of[t][r], x + t * stride + 4 * i,
                                             reinterpret_cast<const char*>(w + 2 * i) + 4 * r);
  }
  void store(TileSums& to) const { to = sums_; }

 private:
  int64_t rows_ = 0, operands_ = 0;
  TileSums sums_;
};

}  // namespace QK_ISA
}  // namespace qk
#endif
