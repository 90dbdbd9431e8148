// Loops over a weight: a thread's units, the rows of a unit, spans of kNoiseSpan elements of a row, sixteen lanes of a
// span. Kernels pass lambdas for the body.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/element_types.h"
#include "../common/quant_args.h"
#include "noise_span.h"

namespace qk {
namespace QK_ISA {

// Calls f with ElementTypes for the dtypes of a weight and of an output.
template <class F>
void with_types(DType w, DType y, F f) {
  if (w == DType::f64) return f(ElementTypes<double, double, double>{});
  if (w == DType::bf16) return f(ElementTypes<float, bfloat16, bfloat16>{});
  if (w == DType::f16) return f(ElementTypes<float, float16, float16>{});
  if (y == DType::bf16) return f(ElementTypes<float, float, bfloat16>{});
  if (y == DType::f16) return f(ElementTypes<float, float, float16>{});
  return f(ElementTypes<float, float, float>{});
}

// Element i of scales, zero points or their gradients, which are float32 or float64.
inline double read_scale(const void* p, DType type, int64_t i) {
  return type == DType::f64 ? static_cast<const double*>(p)[i] : static_cast<const float*>(p)[i];
}
inline void write_scale(void* p, DType type, int64_t i, double value) {
  if (type == DType::f64)
    static_cast<double*>(p)[i] = value;
  else
    static_cast<float*>(p)[i] = static_cast<float>(value);
}

// Lanes to process: all sixteen, known at compile time, or (an int64_t) fewer.
using AllLanes = std::integral_constant<int64_t, kLanes>;

template <class T>
QK_INLINE auto get(const T* p, AllLanes) {
  return load(p);
}
template <class T>
QK_INLINE auto get(const T* p, int64_t n) {
  return load_first(p, n);
}

// How lanes become elements: rounded, or by fewer instructions where the values allow it (elements.h).
struct Rounded {
  template <class T, class V>
  static QK_INLINE void store_all(T* p, const V& x) {
    store(p, x);
  }
};
struct NormalOrZero {
  template <class T, class V>
  static QK_INLINE void store_all(T* p, const V& x) {
    store_normal(p, x);
  }
};
struct Exact {
  template <class T, class V>
  static QK_INLINE void store_all(T* p, const V& x) {
    store_exact(p, x);
  }
};

template <class How, class T, class V>
QK_INLINE void put(T* p, const V& x, AllLanes, bool streaming = false) {
  if (streaming) {
    T lanes[kLanes];
    How::store_all(lanes, x);
    stream(p, static_cast<const T*>(lanes));
  } else {
    How::store_all(p, x);
  }
}
template <class How, class T, class V>
QK_INLINE void put(T* p, const V& x, int64_t n, bool = false) {
  T lanes[kLanes];
  How::store_all(lanes, x);
  std::memcpy(p, lanes, n * sizeof(T));
}

// Calls f(i, count) for the elements i ... i + count - 1 of n, sixteen at a time and then the rest.
template <class F>
QK_INLINE void for_lanes(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, AllLanes{});
  if (i < n) f(i, n - i);
}

// Outputs of as many bytes are written past the caches: they would evict everything else, and not stay themselves.
constexpr int64_t kTooLarge = 24 << 20;

// Whether to write an output past the caches: it is too large for them, and aligned to whole cache lines.
template <class T>
bool streams(const T* p, const Units& units) {
  return units.rows * units.cols * int64_t(sizeof(T)) >= kTooLarge && reinterpret_cast<uintptr_t>(p) % 64 == 0 &&
         units.cols * sizeof(T) % 64 == 0 && kUnitElements * sizeof(T) % 64 == 0;
}

// Calls f(row, piece, begin, end, RowGrid<T>) for each row, or piece of a row, of units [first, last). begin and end
// are positions in the flat tensor. Scales get their noise here.
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
      f(row, piece, begin, end, RowGrid<T>(grid, scale, zero));
    }
  }
}

// The weight that a call quantizes: w, plus noise if the call has any, which is drawn a span at a time.
template <class T, class W>
class NoisyWeight {
 public:
  explicit NoisyWeight(const QuantArgs& args)
      : args_(args), w_(static_cast<const W*>(args.w)), noisy_(args.seed && args.noise_std != 0) {}

  // Calls f(i, count, w) with the lanes at positions i ... i + count - 1 of [begin, end), and done() after each span.
  template <class F, class G>
  QK_INLINE void for_spans(int64_t begin, int64_t end, F f, G done) {
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
