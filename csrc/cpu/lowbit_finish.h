// From the sums of a block to y.
#pragma once

#include "lowbit_plan.h"
#include "packed_codes.h"

namespace qk {
namespace QK_ISA {

// Weighs limbs, multiplies with the scales of tokens, adds the bias, and writes y in its dtype: for the panel of `rows`
// output features from `first_feature` on.
template <class Y>
inline void finish(const LowbitBlock& b, int64_t first_feature, int64_t rows, const float* sums, Y* y) {
  const LowbitLinearCall& call = b.plan.call;
  const int64_t limbs = b.plan.limbs;
  float bias[kPanel] = {};
  if (call.bias)
    for (int64_t r = 0; r < rows; ++r) bias[r] = read_float(call.bias, call.bias_type, first_feature + r);
  for (int64_t i = 0; i < b.act_rows; i += limbs) {
    const int64_t token = (b.first_act_row + i) / limbs;
    Y out[kPanel];
    for (int64_t r = 0; r < kPanel; r += kLanes) {
      F32 v = load(sums + i * kPanel + r);
      for (int64_t limb = 1; limb < limbs; ++limb)
        v = multiply_add(load(sums + (i + limb) * kPanel + r), F32(kLimbWeights[limb]), v);
      if (b.x.scales) v = v * F32(b.x.scales[token]);
      if (call.bias) v = v + load(bias + r);
      store(out + r, v);
    }
    std::memcpy(y + token * call.rows + first_feature, out, rows * sizeof(Y));
  }
}

// The same for all panels of a block, whose sums are [panels, act_rows, kPanel].
inline void finish_panels(const LowbitBlock& b, const float* sums) {
  for (int64_t r = 0; r < b.rows; r += kPanel, sums += b.act_rows * kPanel)
    with_float(b.plan.call.x_type, b.plan.call.y,
               [&](auto* y) { finish(b, b.first_feature + r, std::min(kPanel, b.rows - r), sums, y); });
}

}  // namespace QK_ISA
}  // namespace qk
