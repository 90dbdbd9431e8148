// The element types that a kernel is compiled for, as one template argument.
#pragma once

namespace qk {

template <class Compute, class Weight, class Output>
struct ElementTypes {
  using T = Compute;  // the type of computations: float, or double for float64 weights
  using W = Weight;   // of the weight
  using Y = Output;   // of the result, or of the gradient that comes in
};

}  // namespace qk
