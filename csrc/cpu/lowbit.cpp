// Products with packed weights: the choice of a kernel, and what all kernels share. That is reading tokens, turning
// them into integers, walking over blocks of the result, and finishing their sums.
#include "lowbit.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <memory>
#include <vector>

#include "lowbit_kernels.h"
#include "packed_codes.h"

namespace qk {
namespace QK_ISA {
namespace {

// The first that serves a call takes it.
constexpr const LowbitKernel* kKernels[] = {
#if defined(QK_LOWBIT_VNNI)
    &bf16_tiles_kernel, &int8_tiles_kernel,
#if defined(__AVX512VBMI__)
    &lut_kernel,
#endif
#if defined(__AVX512BF16__)
    &bf16_kernel,
#endif
    &int8_kernel,
#endif
    &float_kernel,
};

constexpr int64_t kAlignment = 64;  // bytes, a line of the cache

// Reads a row as float32, sixteen at a time, the last sixteen padded with zeros.
template <class T>
void widen_row(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store(to + i, load_first(from + i, n - i));
}

// Turns a token into integers of magnitudes up to `limit` in place, and returns their scale. A token that holds NaN or
// an infinity becomes zeros with the scale NaN.
float quantize_token(float* x, int64_t n, float limit) {
  F32 largest(0.0f), poison(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 v = load(x + i);
    largest = max_of(max_of(v, F32(0.0f) - v), largest);
    poison = poison + (v - v);
  }
  float lanes[kLanes];
  store(lanes, largest);
  if (sum(poison) != 0) {
    std::fill(x, x + n, 0.0f);
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = std::max(*std::max_element(lanes, lanes + kLanes) / limit, std::numeric_limits<float>::min());
  for (int64_t i = 0; i < n; i += kLanes)
    store(x + i, min_of(F32(limit), max_of(F32(0.0f - limit), load(x + i) / F32(scale))));
  for (int64_t i = 0; i < n; ++i) x[i] = std::nearbyint(x[i]);
  return scale;
}

// The output features [first_feature, first_feature + rows) of all tokens of an expert, a block of tokens at a time.
void multiply_panels(const LowbitPlan& plan, const LowbitActivations& x, const Expert& expert, int64_t first_feature,
                     int64_t rows, float* sums, void* scratch) {
  const LowbitLinearCall& call = plan.call;
  const int64_t tokens = expert.last - expert.first, end = expert.last * plan.limbs;
  const int64_t blocks = (tokens * plan.limbs + plan.block_act_rows - 1) / plan.block_act_rows;
  const int64_t step = round_up((tokens + blocks - 1) / blocks, plan.token_step) * plan.limbs;
  for (int64_t first = expert.first * plan.limbs; first < end; first += step) {
    const LowbitBlock block{
        plan, x, first, std::min(step, end - first), expert.index * call.rows + first_feature, rows, first_feature};
    plan.kernel->multiply(block, sums, scratch);
  }
}

template <class T>
T* aligned(const std::unique_ptr<T[]>& memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory.get());
  return reinterpret_cast<T*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

}  // namespace

LowbitPlan lowbit_plan(const LowbitLinearCall& call) {
  LowbitPlan plan{};
  plan.call = call;
  plan.limbs = plan.block_panels = plan.token_step = 1;
  plan.kernel = *std::find_if(std::begin(kKernels), std::end(kKernels),
                              [&](const LowbitKernel* kernel) { return kernel->serves(call); });
  plan.kernel->plan(plan);
  if (!plan.sum_rows) plan.sum_rows = plan.block_act_rows;

  int64_t end = 0;
  const auto place = [&end](bool present, int64_t bytes) {
    const int64_t at = end;
    if (present) end += round_up(bytes, kAlignment);
    return at;
  };
  const int64_t tokens = round_up(call.tokens, plan.token_step), act_rows = tokens * plan.limbs;
  const int64_t group_floats = act_rows * call.groups * static_cast<int64_t>(sizeof(float));
  place(true, act_rows * plan.stride());
  plan.sums_at = place(plan.has_sums, group_floats);
  plan.scales_at = place(plan.has_scales(), tokens * static_cast<int64_t>(sizeof(float)));
  plan.units_at = place(plan.has_units, group_floats);
  plan.buffer_bytes = end;
  return plan;
}

void lowbit_prepare(const LowbitPlan& plan, void* buffer, int64_t begin, int64_t end) {
  const LowbitLinearCall& call = plan.call;
  const LowbitActivations to = plan.activations(buffer);
  const float limit = call.act_bits ? static_cast<float>((1 << (call.act_bits - 1)) - 1) : kLargestInteger;
  std::vector<float> values(plan.padded_cols + kLanes), spare(plan.spare_bytes / sizeof(float));
  float* const x = values.data();
  for (int64_t token = begin; token < end; ++token) {
    with_float(call.x_type, call.x, [&](auto* from) { widen_row(from + token * call.cols, call.cols, x); });
    std::fill(x + call.cols, x + plan.padded_cols, 0.0f);
    if (to.scales) to.scales[token] = quantize_token(x, plan.padded_cols, limit);
    plan.kernel->prepare(plan, to, token, x, spare.data());
  }
}

void lowbit_multiply(const LowbitPlan& plan, void* buffer, const Expert* experts, int64_t begin, int64_t end) {
  const LowbitActivations x = plan.activations(buffer);
  const int64_t panels = (plan.call.rows + kPanel - 1) / kPanel;
  // Not initialized: the kernel fills them.
  const int64_t floats = plan.block_panels * plan.sum_rows * kPanel;
  const std::unique_ptr<float[]> sums(new float[floats + kAlignment / sizeof(float)]);
  const std::unique_ptr<char[]> scratch(new char[plan.scratch_bytes + kAlignment]);
  for (int64_t unit = begin, taken; unit < end; unit += taken) {
    const int64_t panel = unit % panels, first_feature = panel * kPanel;
    taken = std::min({plan.block_panels, end - unit, panels - panel});
    multiply_panels(plan, x, experts[unit / panels], first_feature,
                    std::min(taken * kPanel, plan.call.rows - first_feature), aligned(sums), aligned(scratch));
  }
}

}  // namespace QK_ISA
}  // namespace qk
