// How calls are divided among threads.
#pragma once

#include <cstdint>

namespace qk {

constexpr int64_t kUnitElements = 16384;  // about what stays in the first two cache levels
constexpr int64_t kUnitRows = 1024;       // at most in a unit: the noise of their scales is drawn in one span
constexpr int64_t kNoiseSpan = 1024;      // elements whose noise is drawn together; a multiple of 64

// The units of a weight: several short rows, or a piece of a long row.
struct Units {
  int64_t rows, cols, rows_per_unit, pieces_per_row;

  Units(int64_t rows_, int64_t cols_) : rows(rows_), cols(cols_) {
    rows_per_unit = cols >= kUnitElements ? 1 : kUnitElements / (cols > 0 ? cols : 1);
    if (rows_per_unit > kUnitRows) rows_per_unit = kUnitRows;
    pieces_per_row = cols > kUnitElements ? (cols + kUnitElements - 1) / kUnitElements : 1;
  }
  int64_t count() const { return cols > 0 ? (rows + rows_per_unit - 1) / rows_per_unit * pieces_per_row : 0; }
};

// The grain size of at::parallel_for where a row is a unit: the fewest rows of this length for one thread.
inline int64_t grain_of_rows(int64_t cols) {
  const int64_t rows = kUnitElements / (cols > 0 ? cols : 1);
  return rows > 0 ? rows : 1;
}

// The tokens [first, last) of an expert; only experts that have tokens get one of these.
struct Expert {
  int64_t index, first, last;
};

}  // namespace qk
