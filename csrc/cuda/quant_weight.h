// QuantArgs as kernels take them (QuantWeight), and the choice of a kernel's template arguments from a call.
#pragma once

#include "../common/element_types.h"
#include "../common/philox.h"
#include "../common/quant_args.h"
#include "divide.h"
#include "tile.h"

namespace qk::cuda {

// Standard normals for V elements of a stream, from `first` on. V is 1, or 4 or 8 and `first` a multiple of it.
template <int V>
__device__ __forceinline__ void draw(uint64_t seed, int64_t first, uint32_t stream, float (&z)[V]) {
  static_assert(V == 1 || V == 4 || V == 8);
  const uint64_t counter = static_cast<uint64_t>(first) / 8;
  const auto words = [&](uint64_t c) {
    return philox(seed, static_cast<uint32_t>(c), static_cast<uint32_t>(c >> 32), stream);
  };
  if constexpr (V == 1) {
    const auto x = words(counter);
    const uint32_t low = first & 2 ? x.x1 : x.x0, high = first & 2 ? x.x3 : x.x2;
    float even, odd;
    box_muller<float, uint32_t>(first & 4 ? high : low, even, odd);
    z[0] = first & 1 ? odd : even;
  } else if constexpr (V == 4) {
    const auto x = words(counter);
    box_muller<float, uint32_t>(first & 4 ? x.x2 : x.x0, z[0], z[1]);
    box_muller<float, uint32_t>(first & 4 ? x.x3 : x.x1, z[2], z[3]);
  } else {
    const auto x = words(counter);
    box_muller<float, uint32_t>(x.x0, z[0], z[1]);
    box_muller<float, uint32_t>(x.x1, z[2], z[3]);
    box_muller<float, uint32_t>(x.x2, z[4], z[5]);
    box_muller<float, uint32_t>(x.x3, z[6], z[7]);
  }
}

// Scales, zero points and their gradients are float32; where the computing type is float64 they may be float64
// (`wide`).
__device__ __forceinline__ void read_scalar(const void* p, bool, int64_t i, float& x) {
  x = __ldg(static_cast<const float*>(p) + i);
}
__device__ __forceinline__ void read_scalar(const void* p, bool wide, int64_t i, double& x) {
  x = wide ? __ldg(static_cast<const double*>(p) + i) : __ldg(static_cast<const float*>(p) + i);
}
__device__ __forceinline__ void write_scalar(void* p, bool, int64_t i, float x) { static_cast<float*>(p)[i] = x; }
__device__ __forceinline__ void write_scalar(void* p, bool wide, int64_t i, double x) {
  if (wide)
    static_cast<double*>(p)[i] = x;
  else
    static_cast<float*>(p)[i] = static_cast<float>(x);
}

// Scale and zero point of a row as they are in memory.
template <class T>
struct RowScale {
  T scale, zero;
};

// The grid of a row, and the division by its scale.
template <class T>
struct ScaledRow : RowGrid<T> {
  Divisor<T> divisor;

  __device__ __forceinline__ ScaledRow(const Grid<T>& grid, T s, T zero)
      : RowGrid<T>(grid, s, zero), divisor(this->scale) {}
};

// The tensors and constants of QuantArgs in the computing type.
template <class T>
struct QuantWeight {
  const void *w, *scale, *zero_point;
  const int64_t* seed;
  Grid<T> grid;
  T grad_scale;
  float noise_std, scale_noise_std;
  bool wide;  // scale and zero point are float64

  explicit QuantWeight(const QuantArgs& args)
      : w(args.w),
        scale(args.scale),
        zero_point(args.zero_point),
        seed(args.seed),
        grid(args.grid.as<T>()),
        grad_scale(static_cast<T>(args.grad_scale)),
        noise_std(static_cast<float>(args.noise_std)),
        scale_noise_std(static_cast<float>(args.scale_noise_std)),
        wide(args.scale_type == DType::f64) {}

  template <bool Zero>
  __device__ __forceinline__ RowScale<T> read(int64_t r) const {
    RowScale<T> s{0, 0};
    read_scalar(scale, wide, r, s.scale);
    if constexpr (Zero) read_scalar(zero_point, wide, r, s.zero);
    return s;
  }
  template <bool Zero, class Tile>
  __device__ __forceinline__ void read(const Tile& tile, RowScale<T> (&scales)[Tile::kRows]) const {
#pragma unroll
    for (int k = 0; k < Tile::kRows; ++k) scales[k] = read<Zero>(tile.row(k));
  }

  template <bool Noise>
  __device__ __forceinline__ ScaledRow<T> row(RowScale<T> s, int64_t r) const {
    if constexpr (Noise) {
      if (scale_noise_std != 0) {
        float drawn[1];
        draw(static_cast<uint64_t>(__ldg(seed)), r, kScaleStream, drawn);
        s.scale += static_cast<T>(drawn[0] * scale_noise_std);
      }
    }
    return ScaledRow<T>(grid, s.scale, s.zero);
  }

  // The weights of a vector that was loaded from element `first` of w on, in the computing type, with their noise
  // added.
  template <bool Noise, class W, int V>
  __device__ __forceinline__ void values(const Vector<W, V>& vector, int64_t first, T (&x)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = widen(vector.lane[j]);
    if constexpr (Noise) {
      if (noise_std != 0) {
        float z[V];
        draw(static_cast<uint64_t>(__ldg(seed)), first, kWeightStream, z);
#pragma unroll
        for (int j = 0; j < V; ++j) x[j] += static_cast<T>(z[j] * noise_std);
      }
    }
  }
};

// Calls f with ElementTypes for the dtypes of a weight and of an output.
template <class F>
cudaError_t with_types(DType w, DType y, F f) {
  if (w == DType::f64) return f(ElementTypes<double, double, double>{});
  if (w == DType::bf16) return f(ElementTypes<float, __nv_bfloat16, __nv_bfloat16>{});
  if (w == DType::f16) return f(ElementTypes<float, __half, __half>{});
  if (y == DType::bf16) return f(ElementTypes<float, float, __nv_bfloat16>{});
  if (y == DType::f16) return f(ElementTypes<float, float, __half>{});
  return f(ElementTypes<float, float, float>{});
}

template <class F>
cudaError_t with_bool(bool value, F f) {
  return value ? f(std::true_type{}) : f(std::false_type{});
}

inline bool is_noisy(const QuantArgs& args) { return args.seed && (args.noise_std != 0 || args.scale_noise_std != 0); }

template <int V, class T>
bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (V * sizeof(T)) == 0;
}

// Calls f with the number of elements of a vector: as many of Widest as 16 bytes hold, or 1 where the number of columns
// or a pointer does not allow it (and for float64, whose division needs the registers).
template <class Widest, class F, class... Pointers>
cudaError_t with_vector(int64_t cols, F f, Pointers... pointers) {
  constexpr int kVector = sizeof(Widest) == 8 ? 1 : 16 / sizeof(Widest);
  if (cols % kVector == 0 && (aligned<kVector>(pointers) && ...)) return f(std::integral_constant<int, kVector>{});
  return f(std::integral_constant<int, 1>{});
}

}  // namespace qk::cuda
