// Names and shapes as Python shows them, for messages.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>

#include <string>

namespace qk {

std::string name_of(at::ScalarType type);
// A tuple.
std::string shape_string(at::IntArrayRef sizes);

}  // namespace qk
