// Walking a weight: units to rows to spans of at most 1024 elements to sixteen lanes.
#pragma once

#include <algorithm>
#include <type_traits>

#include "noise.h"

namespace qk {
namespace QK_ISA {

template <class Compute, class W, class Y>
struct Types {
  using C = Compute;
  using w = W;
  using y = Y;
};

// Calls f with the Types of a weight and of what has y's dtype.
template <class F>
void with_types(DType w, DType y, F f) {
  if (w == DType::f64) return f(Types<double, double, double>{});
  if (w == DType::bf16) return f(Types<float, bfloat16, bfloat16>{});
  if (w == DType::f16) return f(Types<float, float16, float16>{});
  if (y == DType::bf16) return f(Types<float, float, bfloat16>{});
  if (y == DType::f16) return f(Types<float, float, float16>{});
  return f(Types<float, float, float>{});
}

// A scale, a zero point or their gradient: float32 or float64.
inline double read_scale(const void* p, DType type, int64_t i) {
  return type == DType::f64 ? static_cast<const double*>(p)[i] : static_cast<const float*>(p)[i];
}
inline void write_scale(void* p, DType type, int64_t i, double value) {
  if (type == DType::f64)
    static_cast<double*>(p)[i] = value;
  else
    static_cast<float*>(p)[i] = static_cast<float>(value);
}

// A count of lanes: all sixteen, known to the compiler, or fewer.
using All = std::integral_constant<int64_t, kLanes>;

template <class T>
QK_HD auto get(const T* p, All) {
  return load(p);
}
template <class T>
QK_HD auto get(const T* p, int64_t n) {
  return load_first(p, n);
}
// How lanes become elements: rounded, or by a shorter way where their values allow it.
struct Rounded {
  template <class T, class V>
  static QK_HD void store_all(T* p, const V& x) {
    store(p, x);
  }
};
struct NormalOrZero {
  template <class T, class V>
  static QK_HD void store_all(T* p, const V& x) {
    store_normal(p, x);
  }
};
struct Exact {
  template <class T, class V>
  static QK_HD void store_all(T* p, const V& x) {
    store_exact(p, x);
  }
};

template <class How, class T, class V>
QK_HD void put(T* p, const V& x, All, bool streaming = false) {
  if (streaming) {
    T lanes[kLanes];
    How::store_all(lanes, x);
    stream(p, static_cast<const T*>(lanes));
  } else {
    How::store_all(p, x);
  }
}
template <class How, class T, class V>
QK_HD void put(T* p, const V& x, int64_t n, bool = false) {
  T lanes[kLanes];
  How::store_all(lanes, x);
  std::memcpy(p, lanes, n * sizeof(T));
}

template <class F>
QK_HD void for_lanes(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, All{});
  if (i < n) f(i, n - i);
}

// Bytes of an output that is not wanted in the caches.
constexpr int64_t kTooLarge = 24 << 20;

// Whether an output is too large to be wanted in the caches and aligned so that it can pass them by.
template <class T>
bool streams(const T* p, const Units& units) {
  return units.rows * units.cols * int64_t(sizeof(T)) >= kTooLarge && reinterpret_cast<uintptr_t>(p) % 64 == 0 &&
         units.cols * sizeof(T) % 64 == 0 && kUnitElements * sizeof(T) % 64 == 0;
}

// Calls f(row, piece, begin, end, Row<T>) for each row or piece of a row of units [first, last); begin and end are
// positions in the flat tensor.
template <class T, class F>
void for_rows(const QuantArgs& args, int64_t first, int64_t last, F f) {
  const Units units(args.rows, args.cols);
  const Grid<T> grid = args.grid.as<T>();
  NoiseSpan noise;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t piece = unit % units.pieces_per_row;
    const int64_t row_begin = unit / units.pieces_per_row * units.rows_per_unit;
    const int64_t row_end = std::min(row_begin + units.rows_per_unit, units.rows);
    const float* drawn = args.seed && args.scale_noise_std != 0
                             ? noise.draw(*args.seed, row_begin, row_end - row_begin, kScaleStream)
                             : nullptr;
    for (int64_t row = row_begin; row < row_end; ++row) {
      T scale = static_cast<T>(read_scale(args.scale, args.scale_type, row));
      if (drawn) scale += static_cast<T>(drawn[row - row_begin] * static_cast<float>(args.scale_noise_std));
      const T zero = args.zero_point ? static_cast<T>(read_scale(args.zero_point, args.scale_type, row)) : T(0);
      const int64_t begin = row * units.cols + piece * kUnitElements;
      const int64_t end = std::min(begin + kUnitElements, (row + 1) * units.cols);
      f(row, piece, begin, end, Row<T>(grid, scale, zero));
    }
  }
}

// The weight a noisy call quantizes: w, or w plus noise drawn a span at a time.
template <class T, class W>
class Weights {
 public:
  explicit Weights(const QuantArgs& args)
      : args_(args), w_(static_cast<const W*>(args.w)), noisy_(args.seed && args.noise_std != 0) {}

  // Calls f(i, count, w) for the lanes at positions i of [begin, end), and after each span calls done().
  template <class F, class G>
  QK_HD void for_spans(int64_t begin, int64_t end, F f, G done) {
    for (int64_t start = begin; start < end; start += kNoiseSpan) {
      const int64_t n = std::min(kNoiseSpan, end - start);
      const float* drawn = noisy_ ? noise_.draw(*args_.seed, start, n, kWeightStream) : nullptr;
      const F32 std_dev(static_cast<float>(args_.noise_std));
      for_lanes(n, [&](int64_t i, auto count) QK_INLINE_LAMBDA {
        Vec<T> w = get(w_ + start + i, count);
        if (noisy_) {
          Vec<T> wide;
          widen(get(drawn + i, count) * std_dev, wide);
          w = w + wide;
        }
        f(start + i, count, w);
      });
      done();
    }
  }

 private:
  const QuantArgs& args_;
  const W* w_;
  bool noisy_;
  NoiseSpan noise_;
};

}  // namespace QK_ISA
}  // namespace qk
