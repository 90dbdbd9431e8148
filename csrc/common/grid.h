// What quantization means for one element: its code, its value, and the straight-through derivatives.
//
// The mirror of qatkernels/ops/_fake_quantize.py, shared by the CPU and the CUDA kernels. V is float, double or a SIMD
// vector of either that provides the operators, and select, min_of, max_of and round_half_even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// A function that kernels of both devices inline.
#if defined(__CUDACC__)
#define QK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QK_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace qk {

constexpr double kMinScale = 1e-5;

// Grid.constants of qatkernels/grids.py, which says what they mean.
template <class T>
struct Grid {
  T steps, offset, low, high, pass_low, pass_high, below, above, residual;
  bool by_sign;

  template <class U>
  Grid<U> as() const {
    return {U(steps), U(offset), U(low), U(high), U(pass_low), U(pass_high), U(below), U(above), U(residual), by_sign};
  }
};

// Whether a normal number is a power of two. If so, dividing by it and multiplying by its reciprocal give the same
// bits.
QK_HOST_DEVICE bool is_power_of_two(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (bits & 0x007FFFFFu) == 0;
}
QK_HOST_DEVICE bool is_power_of_two(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (bits & 0x000FFFFFFFFFFFFFu) == 0;
}

// The grid of a row, which shares a scale and a zero point: the scale clamped, the grid shifted by the zero point.
template <class T>
struct RowGrid {
  Grid<T> grid;
  T scale, step, inverse_steps;
  bool inverse_is_exact;

  QK_HOST_DEVICE RowGrid(const Grid<T>& g, T s, T zero) : grid(g) {
    scale = s < T(kMinScale) ? T(kMinScale) : s;  // NaN stays
    step = scale / g.steps;
    inverse_steps = T(1) / g.steps;
    inverse_is_exact = is_power_of_two(g.steps);
    grid.offset -= zero;
    grid.low -= zero;
    grid.high -= zero;
    grid.pass_low -= zero;
    grid.pass_high -= zero;
    grid.below -= zero;
    grid.above -= zero;
  }
};

#if defined(__CUDACC__) || defined(QK_HOST_CUDA)
template <class T>
QK_HOST_DEVICE T select(bool mask, T a, T b) {
  return mask ? a : b;
}
// Both return b where either is NaN.
template <class T>
QK_HOST_DEVICE T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
QK_HOST_DEVICE T max_of(T a, T b) {
  return a > b ? a : b;
}
#if __CUDA_ARCH__ >= 800
// One instruction instead of a comparison and a selection. Returns NaN if either operand is NaN.
QK_HOST_DEVICE float min_of(float a, float b) {
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
  return a;
}
QK_HOST_DEVICE float max_of(float a, float b) {
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
  return a;
}
#endif
QK_HOST_DEVICE float round_half_even(float x) { return rintf(x); }
QK_HOST_DEVICE double round_half_even(double x) { return rint(x); }
#endif

// The code of w, as a floating point number; r = w / scale.
template <class V, class T>
QK_HOST_DEVICE V code_of(V w, V r, const RowGrid<T>& row) {
  if (row.grid.by_sign) return select(w != w, w, select(w < V(T(0)), V(T(-1)), V(T(0))));
  const V clamped = min_of(V(row.grid.high), max_of(V(row.grid.low), r));
  return round_half_even(clamped * V(row.grid.steps) - V(row.grid.offset));
}

template <class V, class T>
QK_HOST_DEVICE V value_of(V code, const RowGrid<T>& row) {
  return (code + V(row.grid.offset)) * V(row.step);
}

// The straight-through rule at one element: whether the gradient passes, and what multiplies the gradient of the scale
// and of the zero point.
template <class V, class T>
struct Slopes {
  decltype(V() < V()) below, above;
  V scale, zero_point;

  // r = w / scale.
  QK_HOST_DEVICE Slopes(V w, V r, const RowGrid<T>& row) {
    below = r < V(row.grid.pass_low);
    above = r > V(row.grid.pass_high);
    const V level = code_of(w, r, row) + V(row.grid.offset);
    // The quotient, rounded once. Most grids need no division, which takes several times as long as a product.
    const V quotient = row.inverse_is_exact ? level * V(row.inverse_steps) : level / V(row.grid.steps);
    const V inside = quotient - V(row.grid.residual) * r;
    scale = select(below, V(row.grid.below), select(above, V(row.grid.above), inside));
    zero_point = masked(V(-row.scale), V(T(0)));
  }

  // Returns `beyond` outside the pass-through range and x inside. NaN weights count as inside, as in the released code.
  QK_HOST_DEVICE V masked(V beyond, V x) const { return select(below, beyond, select(above, beyond, x)); }
  QK_HOST_DEVICE V masked(V x) const { return masked(V(T(0)), x); }
};

}  // namespace qk
