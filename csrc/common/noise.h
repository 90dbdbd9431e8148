// The call of noise by itself.
#pragma once

#include <cstdint>

namespace qk {

struct NormalCall {
  const int64_t* seed;
  float* out;
  int64_t numel;
  uint32_t stream;
};

}  // namespace qk
