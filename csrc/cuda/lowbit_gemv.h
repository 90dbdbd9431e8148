// The parameters of the decode kernels, and the plan of a call: which kernel, passes of some tokens each, and their
// division into blocks and shared memory.
#pragma once

#include <algorithm>
#include <cmath>

#include "../common/lowbit_linear.h"
#include "lowbit_layout.h"
#include "quant_weight.h"

namespace qk::cuda {

constexpr int kGemvWarps = 16, kGemvThreads = kGemvWarps * kWarp;
constexpr int kTileRows = 16, kSlots = 4;
constexpr int kMaxTokens = 8;

// Tiles of eight activation rows whose sums fit into registers.
QK_HOST_DEVICE constexpr int max_act_tiles(int bits) { return bits >= 5 && bits <= 7 ? 2 : 3; }

struct LowbitGemv {
  const uint8_t* packed;
  const void* scale;
  const float* zero_point;
  const void* bias;
  void* y;
  const uint4* x;    // as lowbit_limbs.h has written it
  const void* x_16;  // the tokens themselves, for the kernel that multiplies them as they are
  const float* unit;
  float* partial;  // [chunks][tokens][rows] where K is cut into chunks, else null
  int64_t rows, cols, groups, row_bytes;
  int32_t rounds, stages, chunk_stages, chunks, row_blocks, warps_per_row;
  int32_t tokens, limbs, act_rows;
  // Granules of a group (lowbit_layout.h). 0 if groups are smaller: then each of the four lanes that share a weight row
  // has activation rows of its own, zero for the other lanes, and the columns of group_lanes lanes are a group.
  int32_t group_granules, group_lanes;
  int32_t copy;  // bytes that are copied at a time: 16, 4 or 1
  uint32_t flip;
  float constant;             // operand = code + constant, where x is multiplied as it is
  bool sums;                  // whether sums of x are needed
  float factor, shift, zero;  // value = (byte + shift - zero_point * zero) * (scale * factor)
  DType x_type, scale_type, bias_type;

  // The scale and zero point of a row in a group: raw bits as loaded, and converted. Conversion waits until they are
  // used, so that the latency of the load is hidden.
  struct RawScale {
    uint32_t scale;
    float zero_point;
  };
  struct Affine {
    float step, shift;
  };
  __device__ __forceinline__ RawScale load_raw(int64_t row, int64_t group) const {
    const int64_t i = row * groups + min(group, groups - 1);
    return {bits_of(scale, scale_type, i), zero_point ? __ldg(zero_point + i) : 0.0f};
  }
  __device__ __forceinline__ Affine affine(const RawScale& raw) const {
    const float s = float_of(raw.scale, scale_type), min_scale = static_cast<float>(kMinScale);
    return {(s < min_scale ? min_scale : s) * factor, shift - raw.zero_point * zero};
  }
  __device__ __forceinline__ static uint32_t bits_of(const void* p, DType type, int64_t i) {
    return type == DType::f32 ? __ldg(static_cast<const unsigned*>(p) + i)
                              : __ldg(static_cast<const unsigned short*>(p) + i);
  }
  __device__ __forceinline__ static float float_of(uint32_t bits, DType type) {
    if (type == DType::f16) {
      __half half;
      memcpy(static_cast<void*>(&half), &bits, sizeof half);
      return widen(half);
    }
    return __int_as_float(static_cast<int32_t>(type == DType::bf16 ? bits << 16 : bits));
  }
  // Adds the bias to a sum and writes it in the dtype of x.
  __device__ __forceinline__ void write(int64_t token, int64_t row, float sum) const {
    const int64_t i = token * rows + row;
    if (bias) sum += float_of(bits_of(bias, bias_type, row), bias_type);
    if (x_type == DType::f32)
      static_cast<float*>(y)[i] = sum;
    else if (x_type == DType::bf16)
      static_cast<__nv_bfloat16*>(y)[i] = __float2bfloat16_rn(sum);
    else
      static_cast<__half*>(y)[i] = __float2half_rn(sum);
  }
};

// The layout of a block's shared memory, in bytes from its start: stages of weights, sums of warps, 16 bytes of zeros,
// units of tokens, x.
struct SharedPlan {
  int slot, sums, zeros, units, x;

  QK_HOST_DEVICE constexpr SharedPlan(const LowbitLayout& layout, int act_tiles)
      : slot(kTileRows * layout.pitch),
        sums(kGemvWarps * kSlots * slot),
        zeros(sums + kGemvWarps * kTileRows * 8 * act_tiles * 4),
        units(zeros + 16),
        x(units + 4 * kMaxTokens) {}
};

// The device's properties that a plan depends on.
struct DeviceLimits {
  int id = 0, multiprocessors = 0, shared = 0;

  cudaError_t query() {
    cudaError_t error = cudaGetDevice(&id);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, id);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
    return error;
  }
};

// How a call is computed on a device.
//
//   by granule  groups are whole granules: each activation row is one row of the product
//   split       groups are whole lanes' shares of a granule: four times the activation rows
//   any         any other groups: a plain kernel without tensor cores
//
// `direct` calls are multiplied by lowbit_gemv16.cu: x of 16 bits as it is, codes of 1, 2 or 4 bits in groups of whole
// granules. The other calls need x as rows of int8 (lowbit_limbs.h).
struct LowbitGemvPlan {
  const LowbitLinearCall& call;
  const DeviceLimits& device;
  const LowbitLayout layout;
  int64_t group_cols;
  bool any, split, direct;
  int limbs, max_tiles, pass_tokens;
  int value_bytes;  // of a number of x in shared memory

  LowbitGemvPlan(const LowbitLinearCall& c, const DeviceLimits& d)
      : call(c), device(d), layout(c.bits), group_cols(c.cols / c.groups) {
    const bool by_granule = call.groups == 1 || group_cols % layout.granule_cols == 0;
    split = !by_granule && call.bits != 8 && group_cols % layout.lane_cols == 0;
    any = !by_granule && !split;
    direct = by_granule && call.act_bits == 0 && call.bits <= 4 && layout.whole &&
             (call.x_type == DType::bf16 || call.x_type == DType::f16);
    limbs = call.act_bits || direct ? 1 : 3;
    value_bytes = direct ? 2 : 1;
    // Devices with 99 KiB of shared memory hold the sums of one tile only, beside at least a stage of x.
    max_tiles = direct ? 1 : max_act_tiles(call.bits);
    if (SharedPlan(layout, max_tiles).x + 8 * max_tiles * layout.stage_cols > device.shared) max_tiles = 1;
    pass_tokens = std::min(kMaxTokens, 8 * max_tiles / (split ? 4 : 1) / limbs);
    any |= pass_tokens == 0;
    if (any) pass_tokens = kMaxTokens;
  }

  // The parameters of the pass that begins with token `first`.
  LowbitGemv pass(int64_t first) const {
    LowbitGemv p{};
    p.packed = call.packed;
    p.scale = call.scale;
    p.zero_point = call.zero_point;
    p.bias = call.bias;
    p.y = static_cast<char*>(call.y) + first * call.rows * (call.x_type == DType::f32 ? 4 : 2);
    p.rows = call.rows;
    p.cols = call.cols;
    p.groups = call.groups;
    p.row_bytes = (call.cols * call.bits + 7) / 8;
    p.x_type = call.x_type;
    p.scale_type = call.scale_type;
    p.bias_type = call.bias_type;
    p.tokens = static_cast<int32_t>(std::min<int64_t>(call.tokens - first, pass_tokens));
    p.chunks = 1;
    const double constant = call.code_min + call.offset;  // value = (code + constant - zero_point) * step
    if (any) {
      p.factor = static_cast<float>(1 / call.steps);
      p.zero = 1;
      p.shift = static_cast<float>(constant);
      return p;
    }

    if (direct)
      set_operand_16(p, constant);
    else
      set_operand_8(p, constant);
    p.limbs = limbs;
    p.act_rows = p.tokens * limbs;
    p.stages = static_cast<int32_t>((p.cols + layout.stage_cols - 1) / layout.stage_cols);
    if (!split)
      p.group_granules = call.groups == 1 ? 1 << 30 : static_cast<int32_t>(group_cols / layout.granule_cols);
    else
      p.group_lanes = static_cast<int32_t>(group_cols / layout.lane_cols);
    const auto aligned_to = [&](int bytes) {
      return p.row_bytes % bytes == 0 && reinterpret_cast<uintptr_t>(p.packed) % static_cast<uintptr_t>(bytes) == 0;
    };
    p.copy = aligned_to(16) ? 16 : aligned_to(4) ? 4 : 1;

    const int left = device.shared - SharedPlan(layout, act_tiles(p)).x;
    p.chunk_stages = std::min(p.stages, std::max(1, left / (layout.stage_cols * p.act_rows * value_bytes)));
    p.chunks = (p.stages + p.chunk_stages - 1) / p.chunk_stages;
    p.chunk_stages = (p.stages + p.chunks - 1) / p.chunks;
    p.chunks = (p.stages + p.chunk_stages - 1) / p.chunk_stages;
    p.warps_per_row = best_warps_per_row(p);
    const int round_rows = kTileRows * kGemvWarps / p.warps_per_row;
    p.rounds = static_cast<int32_t>((p.rows + round_rows - 1) / round_rows);
    p.row_blocks = std::min(p.rounds, std::max(1, device.multiprocessors / p.chunks));
    return p;
  }
  // A decoded byte is unit * (code - half) plus the constant `low` below the code's bits. Where `low` can make that
  // unit * (code + constant), the shift is 0 and no sums of x are needed.
  void set_operand_8(LowbitGemv& p, double constant) const {
    const int unit = 1 << (8 - call.bits);
    const double full_shift = unit * (constant + (1 << (call.bits - 1)));
    const int low = !call.zero_point && full_shift > 0 && full_shift < unit ? static_cast<int>(full_shift) : 0;
    p.flip = 0x01010101u * static_cast<uint32_t>(0x80 | low);
    p.factor = static_cast<float>(1 / (call.steps * unit));
    p.shift = static_cast<float>(full_shift - low);
    p.zero = static_cast<float>(unit);
    p.sums = call.zero_point || p.shift != 0;
  }
  // A decoded number is code + p.constant. If the grid's constant is a multiple of one half, that is the value itself,
  // and no sums of x are needed. Else codes are centered.
  void set_operand_16(LowbitGemv& p, double constant) const {
    const int half = 1 << (call.bits - 1);
    const bool exact = !call.zero_point && constant * 2 == std::rint(constant * 2) && std::abs(constant) <= 2 * half;
    p.constant = static_cast<float>(exact ? constant : -half);
    p.factor = static_cast<float>(1 / call.steps);
    p.shift = static_cast<float>(constant - static_cast<double>(p.constant));
    p.zero = 1;
    p.sums = !exact;
  }
  // How many warps share rows. More of them make the rounds of a block shorter, and their number less uneven, but after
  // each round the warps wait for each other, which takes about as long as kRoundStages stages. The number of blocks
  // is assumed, not the device's, so that sums have the same bits on every device.
  int best_warps_per_row(const LowbitGemv& p) const {
    constexpr int kBlocks = 132, kRoundStages = 2;
    int best = 1;
    int64_t least = INT64_MAX;
    for (int warps = 1; warps <= kGemvWarps && warps <= p.chunk_stages; warps *= 2) {
      const int64_t round_rows = kTileRows * kGemvWarps / warps, rounds = (p.rows + round_rows - 1) / round_rows;
      const int64_t blocks = std::min<int64_t>(rounds, std::max(1, kBlocks / p.chunks));
      const int64_t stages = (p.chunk_stages + warps - 1) / warps;
      const int64_t cost = (rounds + blocks - 1) / blocks * (stages + kRoundStages);
      if (cost < least) {
        least = cost;
        best = warps;
      }
    }
    return best;
  }
  int act_tiles(const LowbitGemv& p) const { return (p.act_rows * (split ? 4 : 1) + 7) / 8; }

  // Bytes of x in shared memory.
  size_t shared_x(const LowbitGemv& p) const {
    return static_cast<size_t>(p.chunk_stages) * layout.stage_cols * p.act_rows * value_bytes;
  }

  // The workspace: units of tokens (kUnitBytes) and x, unless the kernel makes them for itself; partial sums of chunks.
  static constexpr size_t kUnitBytes = 64;
  size_t x_bytes(const LowbitGemv& p) const {
    return direct ? 0 : kUnitBytes + static_cast<size_t>(p.stages) * layout.stage_cols * p.act_rows;
  }
  size_t bytes(const LowbitGemv& p) const {
    return x_bytes(p) + (p.chunks > 1 ? 4 * static_cast<size_t>(p.chunks * p.tokens * p.rows) : 0);
  }
};

// The launch of a pass of a direct call (lowbit_gemv16.cu).
cudaError_t lowbit_gemv16(const LowbitGemv& p, const LowbitGemvPlan& plan, cudaStream_t stream);

}  // namespace qk::cuda
