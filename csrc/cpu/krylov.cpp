// One pass of Gram-Schmidt on the CPU: w_new = w - basis^T h, then basis w_new and w_new . w_new, reading memory once.
//
// Columns are processed block by block. A block of w stays in the first cache level; the block of the basis is read
// twice, the second time from the second cache level. All arithmetic is float64. A sum runs over sixteen lanes through
// a unit of columns, then over units, so its order depends on the shape alone.
#include "krylov.h"

#include <algorithm>
#include <vector>

#include "rows.h"

namespace qk {
namespace QK_ISA {
namespace {

using Doubles = Vec<double>;
constexpr int kParts = Doubles::kCount, kWidth = Doubles::kWidth;
constexpr int kRowsAtOnce = kParts <= 2 ? 4 : kParts == 4 ? 2 : 1;  // whose sums fit into registers

// Calls f(row, count) for all rows, kRowsAtOnce at a time and then one by one. count is a compile-time constant.
template <class F>
QK_INLINE void for_row_groups(int64_t rows, F f) {
  int64_t row = 0;
  for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) f(row, std::integral_constant<int, kRowsAtOnce>{});
  for (; row < rows; ++row) f(row, std::integral_constant<int, 1>{});
}

// The columns [start, start + n) of a basis [rows, cols].
template <class B>
struct BasisBlock {
  const B* basis;
  int64_t rows, cols, start, n;

  const B* at(int64_t row) const { return basis + row * cols + start; }
  // Calls f(i, pointers to column i of `Count` rows) for every sixteen columns, the last ones padded with zeros.
  // Meanwhile it prefetches the same rows of the next block: every Step-th cache line from the Phase-th on, so that two
  // passes over a block share the work evenly and memory is never idle.
  template <int Phase, int Step, int Count, class F>
  QK_INLINE void for_columns(int64_t row, F f) const {
    const B* from[Count];
    for (int j = 0; j < Count; ++j) from[j] = at(row + j);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      constexpr int64_t kLine = std::max<int64_t>(kLanes, 64 / sizeof(B));
      if (i % (kLine * Step) == kLine * Phase)
        for (int j = 0; j < Count; ++j)
          for (size_t byte = 0; byte < kLanes * sizeof(B); byte += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(from[j] + n) + byte, 0, 2);
      f(i, from);
      for (int j = 0; j < Count; ++j) from[j] += kLanes;
    }
    if (i == n) return;
    B last[Count][kLanes] = {};
    for (int j = 0; j < Count; ++j) {
      std::memcpy(last[j], from[j], (n - i) * sizeof(B));
      from[j] = last[j];
    }
    f(i, from);
  }

  // w -= h^T basis; w is padded to whole lanes.
  void subtract(const double* h, double* w) const {
    for_row_groups(rows, [&](int64_t row, auto count) QK_INLINE_LAMBDA {
      for_columns<0, 2, count>(row, [&](int64_t i, const B* const(&from)[count]) QK_INLINE_LAMBDA {
        for (int part = 0; part < kParts; ++part) {
          WideRegister x = load_wide(w + i + part * kWidth);
          for (int j = 0; j < count; ++j) x = x - h[row + j] * load_wide(from[j] + part * kWidth);
          store(w + i + part * kWidth, x);
        }
      });
    });
  }

  // sums [rows, kLanes] += basis * w
  template <int Phase, int Step>
  void dot(const double* w, double* sums) const {
    for_row_groups(rows, [&](int64_t row, auto count) QK_INLINE_LAMBDA {
      WideRegister sum[count][kParts];
      for (int j = 0; j < count; ++j)
        for (int part = 0; part < kParts; ++part) sum[j][part] = load_wide(sums + (row + j) * kLanes + part * kWidth);
      for_columns<Phase, Step, count>(row, [&](int64_t i, const B* const(&from)[count]) QK_INLINE_LAMBDA {
        for (int part = 0; part < kParts; ++part) {
          const WideRegister x = load_wide(w + i + part * kWidth);
          for (int j = 0; j < count; ++j) sum[j][part] = sum[j][part] + load_wide(from[j] + part * kWidth) * x;
        }
      });
      for (int j = 0; j < count; ++j)
        for (int part = 0; part < kParts; ++part) store(sums + (row + j) * kLanes + part * kWidth, sum[j][part]);
    });
  }
};

// x = from, as float64, padded with zeros to a multiple of sixteen.
template <class W>
void widen_block(const W* from, int64_t n, double* x) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(x + i, load_wide(from + i));
  for (; i < (n + kLanes - 1) / kLanes * kLanes; ++i) x[i] = i < n ? static_cast<double>(from[i]) : 0.0;
}

// Rounds x to the type W in place, copies it to `to` unless that is null, and adds x * x to sums [kLanes].
template <class W>
void round_block(double* x, int64_t n, W* to, double* sums) {
  WideRegister sum[kParts];
  for (int part = 0; part < kParts; ++part) sum[part] = load_wide(sums + part * kWidth);
  for (int64_t i = 0; i < n; i += kLanes) {
    W rounded[kLanes];
    for (int part = 0; part < kParts; ++part) {
      store(rounded + part * kWidth, load_wide(x + i + part * kWidth));
      const WideRegister value = load_wide(static_cast<const W*>(rounded) + part * kWidth);
      store(x + i + part * kWidth, value);
      sum[part] = sum[part] + value * value;
    }
    if (to) std::memcpy(to + i, rounded, std::min<int64_t>(kLanes, n - i) * sizeof(W));
  }
  for (int part = 0; part < kParts; ++part) store(sums + part * kWidth, sum[part]);
}

template <class B, class W>
void gram_schmidt_of(const GramSchmidtCall& call, double* partial, int64_t begin, int64_t end) {
  const KrylovUnits units(call.rows, call.cols, sizeof(B));
  std::vector<double> x(units.block), sums((call.rows + 1) * kLanes);
  const W* const from = static_cast<const W*>(call.w);
  W* const to = call.h || call.w_new != call.w ? static_cast<W*>(call.w_new) : nullptr;
  for (int64_t unit = begin; unit < end; ++unit) {
    std::fill(sums.begin(), sums.end(), 0.0);
    const int64_t first = unit * units.blocks_per_unit * units.block;
    const int64_t last = std::min(first + units.blocks_per_unit * units.block, call.cols);
    for (int64_t start = first; start < last; start += units.block) {
      const int64_t n = std::min(units.block, last - start);
      const BasisBlock<B> block{static_cast<const B*>(call.basis), call.rows, call.cols, start, n};
      widen_block(from + start, n, x.data());
      if (call.h) block.subtract(call.h, x.data());
      round_block(x.data(), n, to ? to + start : nullptr, sums.data() + call.rows * kLanes);
      if (call.h)
        block.template dot<1, 2>(x.data(), sums.data());
      else
        block.template dot<0, 1>(x.data(), sums.data());
    }
    for (int64_t row = 0; row <= call.rows; ++row)
      partial[unit * (call.rows + 1) + row] = sum(load(sums.data() + row * kLanes));
  }
}

}  // namespace

void gram_schmidt(const GramSchmidtCall& call, double* partial, int64_t begin, int64_t end) {
  const auto with = [&](auto w) {
    using W = decltype(w);
    if (call.basis_type == DType::f32) return gram_schmidt_of<float, W>(call, partial, begin, end);
    if (call.basis_type == DType::bf16) return gram_schmidt_of<bfloat16, W>(call, partial, begin, end);
    return gram_schmidt_of<double, W>(call, partial, begin, end);
  };
  call.w_type == DType::f64 ? with(double()) : with(float());
}

}  // namespace QK_ISA
}  // namespace qk
