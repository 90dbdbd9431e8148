// Softmax cross-entropy on the CPU, row by row: the loss, its gradient, and the tangent of the gradient (for Hessian
// products), which reads two tensors of the logits' size and writes one.
//
// A sum runs over sixteen lanes through a span, then over spans in float64, so its order depends on the shape alone.
#include "cross_entropy.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "rows.h"

namespace qk {
namespace QK_ISA {
namespace {

constexpr int64_t kSoftmaxSpan = 1024;

enum class Target { valid, ignored, outside };

Target target_of(const CrossEntropyCall& call, int64_t row) {
  const int64_t target = call.targets[row];
  if (target == call.ignore_index) return Target::ignored;
  return 0 <= target && target < call.cols ? Target::valid : Target::outside;
}

template <class F>
QK_INLINE void for_spans(int64_t n, F f) {
  for (int64_t start = 0; start < n; start += kSoftmaxSpan) f(start, std::min(kSoftmaxSpan, n - start));
}

// The largest element.
template <class T, class X>
T max_element_of(const X* x, int64_t n) {
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  Vec<T> largest(lowest);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) largest = max_of(Vec<T>(load(x + i)), largest);
  T lanes[kLanes];
  if (i < n) {
    store(lanes, Vec<T>(load_first(x + i, n - i)));
    std::fill(lanes + n - i, lanes + kLanes, lowest);
    largest = max_of(load(static_cast<const T*>(lanes)), largest);
  }
  store(lanes, largest);
  return *std::max_element(lanes, lanes + kLanes);
}

// The first n lanes of x, the others 0.
template <class T>
QK_INLINE Vec<T> first_lanes(const Vec<T>& x, AllLanes) {
  return x;
}
template <class T>
QK_INLINE Vec<T> first_lanes(const Vec<T>& x, int64_t n) {
  T lanes[kLanes];
  store(lanes, x);
  return load_first(static_cast<const T*>(lanes), n);
}

// log(sum(exp(x))) in one pass over memory. Elements are taken relative to the largest so far; when a span has a larger
// one, the sum so far is rescaled.
template <class T, class X>
double log_sum_exp(const X* x, int64_t cols) {
  double largest = -std::numeric_limits<double>::infinity(), total = 0;
  for_spans(cols, [&](int64_t start, int64_t n) {
    const double span_largest = max_element_of<T>(x + start, n);
    if (span_largest > largest) {
      total = total == 0 ? 0 : total * std::exp(largest - span_largest);
      largest = span_largest;
    }
    const Vec<T> shift(largest == -std::numeric_limits<double>::infinity() ? T(0) : static_cast<T>(largest));
    Vec<T> sums(T(0));
    for_lanes(n, [&](int64_t i, auto count) QK_INLINE_LAMBDA {
      sums = sums + first_lanes(exponential(Vec<T>(get(x + start + i, count)) - shift), count);
    });
    total += sum(sums);
  });
  return largest + std::log(total);
}

}  // namespace

void cross_entropy(const CrossEntropyCall& call, int64_t begin, int64_t end) {
  with_types(call.type, call.type, [&](auto types) {
    using T = typename decltype(types)::T;
    using X = typename decltype(types)::W;
    for (int64_t row = begin; row < end; ++row) {
      const X* const x = static_cast<const X*>(call.logits) + row * call.cols;
      T &loss = static_cast<T*>(call.loss)[row], &lse = static_cast<T*>(call.lse_out)[row];
      const Target target = target_of(call, row);
      if (target == Target::ignored) {
        loss = lse = T(0);
        continue;
      }
      const double exact = log_sum_exp<T>(x, call.cols);
      lse = static_cast<T>(exact);
      loss = std::numeric_limits<T>::quiet_NaN();
      if (target == Target::valid) {
        T lanes[kLanes];
        store(lanes, Vec<T>(get(x + call.targets[row], 1)));
        loss = static_cast<T>(exact - lanes[0]);
      }
    }
  });
}

namespace {

// Whether to use streaming stores for an output: it does not fit the caches. An output in place is in them already.
bool passes_caches(const CrossEntropyCall& call, const void* out, int64_t element_bytes) {
  return out != call.logits && out != call.tangent && call.rows * call.cols * element_bytes >= kTooLarge;
}

// for_lanes such that full sixteens do not cross cache lines of the output, whose rows start anywhere.
template <class X, class F>
QK_INLINE void for_lanes_aligned(const X* out, int64_t n, F f) {
  const int64_t head = std::min<int64_t>(n, (64 - reinterpret_cast<uintptr_t>(out) % 64) % 64 / sizeof(X));
  for (int64_t i = 0; i < head; i += kLanes) f(i, std::min<int64_t>(kLanes, head - i));
  for_lanes(n - head, [&](int64_t i, auto count) QK_INLINE_LAMBDA { f(head + i, count); });
}

}  // namespace

void cross_entropy_backward(const CrossEntropyCall& call, int64_t begin, int64_t end) {
  with_types(call.type, call.type, [&](auto types) {
    using T = typename decltype(types)::T;
    using X = typename decltype(types)::W;
    const bool streaming = passes_caches(call, call.grad, sizeof(X));
    for (int64_t row = begin; row < end; ++row) {
      const X* const x = static_cast<const X*>(call.logits) + row * call.cols;
      X* const grad = static_cast<X*>(call.grad) + row * call.cols;
      const Target target = target_of(call, row);
      const T factor =
          target == Target::outside ? std::numeric_limits<T>::quiet_NaN() : static_cast<const T*>(call.g)[row];
      const Vec<T> g(factor), lse(static_cast<const T*>(call.lse)[row]);
      if (target == Target::ignored) {
        std::memset(static_cast<void*>(grad), 0, call.cols * sizeof(X));
        continue;
      }
      const int64_t at = target == Target::valid ? call.targets[row] : 0;
      const Vec<T> p_at = exponential(Vec<T>(get(x + at, 1)) - lse);
      for_lanes_aligned(grad, call.cols, [&](int64_t i, auto count) QK_INLINE_LAMBDA {
        put<Rounded>(grad + i, g * exponential(Vec<T>(get(x + i, count)) - lse), count, streaming);
      });
      put<Rounded>(grad + at, g * (p_at - Vec<T>(T(1))), 1);
    }
    if (streaming) stream_fence();
  });
}

void cross_entropy_hvp(const CrossEntropyCall& call, int64_t begin, int64_t end) {
  with_types(call.type, call.type, [&](auto types) {
    using T = typename decltype(types)::T;
    using X = typename decltype(types)::W;
    const bool streaming = passes_caches(call, call.tangent_grad, sizeof(X));
    std::vector<T> probabilities(call.tangent_grad ? call.cols + kLanes : 0);
    const auto row_value = [](const void* p, int64_t row) { return p ? static_cast<const T*>(p)[row] : T(0); };
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row * call.cols;
      const X *const x = static_cast<const X*>(call.logits) + first, *const v =
                                                                         static_cast<const X*>(call.tangent) + first;
      X* const d = call.grad ? static_cast<X*>(call.grad) + first : nullptr;
      X* const dd = call.tangent_grad ? static_cast<X*>(call.tangent_grad) + first : nullptr;
      T& tangent_loss = static_cast<T*>(call.tangent_loss)[row];
      const Target target = target_of(call, row);
      if (target == Target::ignored) {
        tangent_loss = T(0);
        if (d) std::memset(static_cast<void*>(d), 0, call.cols * sizeof(X));
        if (dd) std::memset(static_cast<void*>(dd), 0, call.cols * sizeof(X));
        continue;
      }
      const Vec<T> one(T(1)), lse(row_value(call.lse, row));
      double total = 0;
      for_spans(call.cols, [&](int64_t start, int64_t n) {
        Vec<T> sums(T(0));
        for_lanes(n, [&](int64_t i, auto count) QK_INLINE_LAMBDA {
          const Vec<T> p = exponential(Vec<T>(get(x + start + i, count)) - lse);
          if (dd) store(probabilities.data() + start + i, p);
          sums = sums + first_lanes(p * Vec<T>(get(v + start + i, count)), count);
        });
        total += sum(sums);
      });
      const T nan = std::numeric_limits<T>::quiet_NaN();
      const int64_t at = target == Target::valid ? call.targets[row] : 0;
      // Read before anything is written: an output may be the memory of the tangent.
      const Vec<T> v_at = get(v + at, 1);
      T lanes[kLanes];
      store(lanes, v_at);
      tangent_loss = target == Target::valid ? static_cast<T>(total - lanes[0]) : nan;
      if (!dd) continue;
      const Vec<T> g(target == Target::valid ? row_value(call.g, row) : nan), tangent_g(row_value(call.tangent_g, row)),
          mean(static_cast<T>(total));
      for_lanes_aligned(dd, call.cols, [&](int64_t i, auto count) QK_INLINE_LAMBDA {
        const Vec<T> p = load(static_cast<const T*>(probabilities.data()) + i), slope = g * p;
        const Vec<T> tangent = slope * (Vec<T>(get(v + i, count)) - mean) + tangent_g * p;
        if (d) put<Rounded>(d + i, slope, count);
        put<Rounded>(dd + i, tangent, count, streaming);
      });
      const Vec<T> p(probabilities[at]);
      if (d) put<Rounded>(d + at, g * (p - one), 1);
      put<Rounded>(dd + at, g * p * (v_at - mean) + tangent_g * (p - one), 1);
    }
    if (streaming) stream_fence();
  });
}

}  // namespace QK_ISA
}  // namespace qk
