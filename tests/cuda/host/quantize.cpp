// The launchers of codes by C names, for ctypes.
#include "cuda/quantize.h"

extern "C" {

int quantize(const qk::QuantizeCall* call) { return qk::cuda::quantize(*call, nullptr); }
int dequantize(const qk::DequantizeCall* call) { return qk::cuda::dequantize(*call, nullptr); }
}
