#include "tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include "../cpu/pool.h"
#include "text.h"

namespace qk {

std::string name_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "torch.float32";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kHalf:
      return "torch.float16";
    case at::kDouble:
      return "torch.float64";
    case at::kChar:
      return "torch.int8";
    case at::kByte:
      return "torch.uint8";
    case at::kInt:
      return "torch.int32";
    case at::kLong:
      return "torch.int64";
    case at::kShort:
      return "torch.int16";
    case at::kComplexFloat:
      return "torch.complex64";
    case at::kComplexDouble:
      return "torch.complex128";
    default: {
      std::string name = c10::toString(type);
      std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
      return "torch." + name;
    }
  }
}

std::string shape_string(at::IntArrayRef sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (i) text += ", ";
    text += std::to_string(sizes[i]);
  }
  text += sizes.size() == 1 ? ",)" : ")";
  return text;
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    case at::kDouble:
      return DType::f64;
    default:
      TORCH_INTERNAL_ASSERT(false, "not a floating point tensor: ", name_of(t.scalar_type()));
  }
}

Tensor allocate(at::IntArrayRef sizes, at::ScalarType type, at::Device device) {
  int64_t bytes = static_cast<int64_t>(c10::elementSize(type));
  for (const int64_t size : sizes)
    TORCH_CHECK(!__builtin_mul_overflow(bytes, size, &bytes), "a result of shape ", shape_string(sizes),
                " has more bytes than a 64-bit number counts");
  const auto options = at::TensorOptions().dtype(type).device(device);
  if (!device.is_cpu() || bytes < cpu::kPooledBytes) return at::empty(sizes, options);
  const cpu::MemoryBlock block = cpu::pool_take(bytes);
  const auto give = [block, bytes](void*) { cpu::pool_give(block, bytes); };
  return at::for_blob(block.memory, sizes).deleter(give).options(options).make_tensor();
}
Tensor like(const Tensor& t, OptionalType type) {
  return allocate(t.sizes(), type.value_or(t.scalar_type()), t.device());
}

Grid<double> grid_of(Constants c) {
  TORCH_INTERNAL_ASSERT(c.size() == 10);
  return {c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[0] != 0};
}

std::vector<Expert> experts_of(const Tensor& offsets, int64_t rows, const char* name) {
  std::vector<Expert> experts;
  const at::ArrayRef<int32_t> ends(offsets.const_data_ptr<int32_t>(), offsets.numel());
  int64_t start = 0;
  for (size_t e = 0; e < ends.size(); start = ends[e++]) {
    TORCH_CHECK_VALUE(start <= ends[e] && ends[e] <= rows, "offsets is [", c10::Join(", ", ends),
                      "], must ascend from 0 to at most the ", rows, " rows of ", name);
    if (start < ends[e]) experts.push_back({static_cast<int64_t>(e), start, ends[e]});
  }
  return experts;
}

}  // namespace qk
