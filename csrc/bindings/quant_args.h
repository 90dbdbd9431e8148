// A QuantArgs filled in from tensors.
#pragma once

#include "tensors.h"

namespace qk {

// A QuantArgs and the contiguous tensors it points into.
struct Held {
  QuantArgs args{};
  Tensor w, scale, zero_point, seed;

  Held(const Tensor& w_, const Tensor& scale_, const OptionalTensor& zero_point_, const OptionalTensor& seed_,
       Constants grid, double noise_std = 0, double scale_noise_std = 0, double grad_scale = 1)
      : w(w_.contiguous()), scale(scale_.contiguous()) {
    const bool codes = w.scalar_type() == at::kChar || w.scalar_type() == at::kByte;
    if (!codes) args.w_type = dtype_of("w", w);
    TORCH_CHECK(scale.scalar_type() == at::kFloat ||
                    (scale.scalar_type() == at::kDouble && w.scalar_type() == at::kDouble) ||
                    (scale.scalar_type() == at::kDouble && codes),
                "scale is ", name_of(scale.scalar_type()),
                ", must be torch.float32 (torch.float64 is allowed with a float64 w)");
    TORCH_CHECK(w.numel() == 0 || (scale.numel() > 0 && w.numel() % scale.numel() == 0), "scale has ", scale.numel(),
                " elements, must divide the ", w.numel(), " elements of w");
    check_device("scale", scale, w.device());
    args.rows = scale.numel();
    args.cols = args.rows ? w.numel() / args.rows : 0;
    args.w = w.const_data_ptr();
    args.scale = scale.const_data_ptr();
    args.scale_type = scale.scalar_type() == at::kDouble ? DType::f64 : DType::f32;
    if (zero_point_) {
      zero_point = zero_point_->contiguous();
      TORCH_CHECK(zero_point.numel() == scale.numel() && zero_point.scalar_type() == scale.scalar_type(),
                  "zero_point is ", name_of(zero_point.scalar_type()), " of shape ", zero_point.sizes(),
                  ", must be like scale");
      check_device("zero_point", zero_point, w.device());
      args.zero_point = zero_point.const_data_ptr();
    }
    if (seed_) {
      seed = seed_->contiguous();
      TORCH_CHECK(seed.scalar_type() == at::kLong && seed.numel() == 1,
                  "seed must be an int64 tensor with one element");
      check_device("seed", seed, w.device());
      args.seed = seed.const_data_ptr<int64_t>();
    }
    args.grid = grid_of(grid);
    args.noise_std = noise_std;
    args.scale_noise_std = scale_noise_std;
    args.grad_scale = grad_scale;
  }
  at::Device device() const { return w.device(); }
};

// Tangents of what a QuantArgs holds, made contiguous.
struct Tangents {
  const Held& held;
  Tensor w, scale, zero_point;

  Tangents(const OptionalTensor& w_, const OptionalTensor& scale_, const OptionalTensor& zero_point_, const Held& of)
      : held(of),
        w(checked("tangent_w", w_, of.w)),
        scale(checked("tangent_scale", scale_, of.scale)),
        zero_point(checked("tangent_zero_point", zero_point_, of.scale)) {}

  FakeQuantizeJvpCall call(void* y, DType y_type, void* value = nullptr) const {
    const auto pointer = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
    return {held.args, pointer(w), pointer(scale), pointer(zero_point), y, y_type, value};
  }

 private:
  static Tensor checked(const char* name, const OptionalTensor& t, const Tensor& of) {
    if (!t) return Tensor();
    TORCH_CHECK(t->sizes() == of.sizes() && t->scalar_type() == of.scalar_type(), name,
                " must have the shape and dtype of what it is the tangent of");
    check_device(name, *t, of.device());
    return t->contiguous();
  }
};

}  // namespace qk
