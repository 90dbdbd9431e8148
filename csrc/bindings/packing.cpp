// Packing of codes and unpacking.
#include "../cpu/packing.h"

#include "registry.h"
#include "tensors.h"

namespace qk {
namespace {

void pack(const Tensor& codes, int64_t code_min, int64_t bits, const Tensor& out) {
  const int64_t cols = codes.size(-1), rows = cols ? codes.numel() / cols : 0;
  const PackCall call{codes.const_data_ptr(),         out.mutable_data_ptr<uint8_t>(), rows, cols,
                      static_cast<int32_t>(code_min), static_cast<int32_t>(bits)};
  at::parallel_for(0, rows, grain_of_rows(cols), [&](int64_t begin, int64_t end) { cpu::pack(call, begin, end); });
}

void unpack(const Tensor& packed, int64_t code_min, int64_t bits, int64_t cols, const Tensor& out) {
  const int64_t rows = cols ? out.numel() / cols : 0;
  const UnpackCall call{packed.const_data_ptr<uint8_t>(), out.mutable_data_ptr(),    rows, cols,
                        static_cast<int32_t>(code_min),   static_cast<int32_t>(bits)};
  at::parallel_for(0, rows, grain_of_rows(cols), [&](int64_t begin, int64_t end) { cpu::unpack(call, begin, end); });
}

QK_CPU_KERNEL(pack);
QK_CPU_KERNEL(unpack);

}  // namespace
}  // namespace qk
