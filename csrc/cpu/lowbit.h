// Products with packed weights on the CPU; lowbit_plan.h says how the three follow each other.
#pragma once

#include "isa_kernel.h"
#include "lowbit_plan.h"
#include "units.h"

namespace qk {

QK_PRODUCT_KERNEL(lowbit_plan, LowbitPlan(const LowbitLinearCall&));
// begin and end count tokens. Both are multiples of the plan's token_step, except that end may be the last token.
QK_PRODUCT_KERNEL(lowbit_prepare, void(const LowbitPlan&, void* buffer, int64_t begin, int64_t end));
// begin and end count panels of the weight, one expert after another.
QK_PRODUCT_KERNEL(lowbit_multiply, void(const LowbitPlan&, void* buffer, const Expert*, int64_t begin, int64_t end));

}  // namespace qk
