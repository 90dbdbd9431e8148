// What all bindings share: dtypes, allocation, and loops over torch's threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../common/dtype.h"
#include "../common/grid.h"
#include "../cpu/units.h"

namespace qk {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<at::ScalarType>;
using Constants = at::ArrayRef<double>;

// The dtype of a tensor of floating point numbers.
DType dtype_of(const Tensor& t);

// A new contiguous tensor; on a CPU from the pool, so that weight-sized results do not fault in fresh pages at every
// step.
Tensor allocate(at::IntArrayRef sizes, at::ScalarType type, at::Device device);
Tensor like(const Tensor& t, OptionalType type = std::nullopt);

// The experts that have tokens, of `rows` tokens in all, from offsets on a CPU.
std::vector<Expert> experts_of(const Tensor& offsets, int64_t rows, const char* name);

// The constants of qatkernels.Grid.
Grid<double> grid_of(Constants c);

// Calls f(begin, end) over [0, units) on torch's threads, with dynamic scheduling: a thread that has finished a few
// units takes the next few. For units that take unequal time.
template <class F>
void parallel_dynamic(int64_t units, F f) {
  const int64_t threads = std::min<int64_t>(units, at::get_num_threads());
  const int64_t few = std::max<int64_t>(1, units / (16 * std::max<int64_t>(1, threads)));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin)
      for (int64_t unit; (unit = next.fetch_add(few)) < units;) f(unit, std::min(units, unit + few));
  });
}

}  // namespace qk
