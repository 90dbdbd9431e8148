// What the bindings of ops on a weight share: QuantArgs filled in from tensors, and the loop over units.
#pragma once

#include "../common/quant_args.h"
#include "tensors.h"

namespace qk {

inline const void* pointer_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// A weight, its scales and its grid. The weight may be the codes of one, which have no floating point dtype.
inline QuantArgs quant_args(const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point,
                            const OptionalTensor& seed, Constants grid, double noise_std = 0,
                            double scale_noise_std = 0, double grad_scale = 1) {
  QuantArgs args{};
  args.w = w.const_data_ptr();
  args.scale = scale.const_data_ptr();
  args.zero_point = pointer_or_null(zero_point);
  args.seed = seed ? seed->const_data_ptr<int64_t>() : nullptr;
  args.rows = scale.numel();
  args.cols = args.rows ? w.numel() / args.rows : 0;
  if (w.is_floating_point()) args.w_type = dtype_of(w);
  args.scale_type = dtype_of(scale);
  args.grid = grid_of(grid);
  args.noise_std = noise_std;
  args.scale_noise_std = scale_noise_std;
  args.grad_scale = grad_scale;
  return args;
}

// Calls f(begin, end) for the units of a weight, on torch's threads.
template <class F>
void for_units(const QuantArgs& args, F f) {
  at::parallel_for(0, Units(args.rows, args.cols).count(), 1, f);
}

}  // namespace qk
