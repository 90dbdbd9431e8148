// Dtypes of floating point tensors in the calls of kernels.
//
// A call is plain data: the bindings fill it in, kernels of any device read it. Its pointers are to contiguous tensors
// on the kernel's device, of the shapes and dtypes that its fields say; null where an argument is absent.
// tests/cuda/on_host.py mirrors the calls of CUDA kernels, which are in this folder.
#pragma once

#include <cstdint>

namespace qk {

enum class DType : int32_t { f32, bf16, f16, f64 };

}  // namespace qk
