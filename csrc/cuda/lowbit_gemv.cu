// y = x W^T + bias for at most eight tokens and packed W, where lowbit_gemv16.cu does not serve. This is what decoding
// is made of, and its bound is reading W once. Three things decide whether it gets there:
//
// - Bytes in flight. 3.35 TB/s over 132 multiprocessors at 0.8 us of loaded latency are 20 KiB each. Sixteen warps keep
//   three stages of sixteen rows and 64 bytes on their way to shared memory: 48 KiB, which in registers would be 24 for
//   each thread.
// - Instructions. At 1 bit and 80% of that bandwidth a multiprocessor has to process 90 codes a cycle, and issues 128
//   lanes of instructions, 64 of them logic; one multiplication for each code is out of the question. Tensor cores
//   multiply sixteen rows by eight activation rows of int8 (lowbit_limbs.h) for the price of one activation row, so
//   eight tokens cost what one does. A code costs half an instruction to decode (lowbit_layout.h), half of what 16-bit
//   operands take.
// - x. A kernel of its own makes its limbs, and each block stages them once; blocks stay and walk over rows.
//   (Limbs that each block made for itself took 2 to 5 us longer for each token on an H100.)
//
// Sums are integers, multiplied with a scale for each group. Warps that share rows, then chunks of K, are added in a
// fixed order. The result depends on the device only where x does not fit into its shared memory and K is cut.
#include "lowbit_gemv.h"
#include "lowbit_limbs.h"
#include "lowbit_linear.h"
#include "lowbit_stages.h"

namespace qk::cuda {
namespace {

// The sums of a warp for sixteen rows and `Tiles` times eight activation rows, spread over lanes as ptx.h says:
// products with codes and sums of x, both of the current group, and the total over groups.
template <int Tiles>
struct Sums {
  int32_t products[Tiles][4], x_sums[Tiles][2];
  float total[Tiles][4];

  __device__ __forceinline__ void start_group() {
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) products[n][i] = x_sums[n][i % 2] = 0;
  }
  __device__ __forceinline__ void start() {
    start_group();
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[n][i] = 0;
  }
  __device__ __forceinline__ void end_group(const LowbitGemv::Affine (&affine)[4]) {
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float product = static_cast<float>(products[n][i]), x_sum = static_cast<float>(x_sums[n][i % 2]);
        total[n][i] = fmaf(affine[i].step, fmaf(affine[i].shift, x_sum, product), total[n][i]);
      }
    start_group();
  }
};

// Where this lane finds its operands of x in shared memory: those of activation row n * 8 + g, or zeros.
template <int Tiles>
struct ActivationOperands {
  const uint4* first[Tiles];
  int stride[Tiles];  // between pairs of products

  __device__ __forceinline__ ActivationOperands(const LowbitGemv& p, const uint4* x, const uint4* zeros, int g, int t) {
    const bool split = p.group_granules == 0;
#pragma unroll
    for (int n = 0; n < Tiles; ++n) {
      const int act_row = split ? 2 * n + g / 4 : 8 * n + g;
      const bool mine = act_row < p.act_rows && (!split || g % 4 == t);
      stride[n] = mine ? 4 * p.act_rows : 0;
      first[n] = mine ? x + act_row * 4 + t : zeros;
    }
  }
};

// The products of granule i of a stage, whose first product has x at `at` pairs of products. b keeps the operands of a
// pair from one granule to the next.
template <int Bits, int Tiles>
__device__ __forceinline__ void multiply_granule(const LowbitGemv& p, const uint32_t* words, int i, int at,
                                                 const ActivationOperands<Tiles>& x, uint4 (&b)[Tiles],
                                                 Sums<Tiles>& sums) {
  constexpr LowbitLayout kLayout(Bits);
  constexpr int kGranuleProducts = kLayout.products / kLayout.granules;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  uint32_t upper[kLayout.granule_words], lower[kLayout.granule_words];
#pragma unroll
  for (int w = 0; w < kLayout.granule_words; ++w) {
    upper[w] = words[g * (kLayout.pitch / 4) + kLayout.word(i, t, w)];
    lower[w] = words[(g + 8) * (kLayout.pitch / 4) + kLayout.word(i, t, w)];
  }
  const Decoder<Bits> above(upper), below(lower);
  const auto multiply = [&](auto index) {
    constexpr int kIndex = decltype(index)::value, kRegister = 2 * kIndex;
    const int product = i * kGranuleProducts + kIndex;
    const uint32_t a0 = above.template get<kRegister>(p.flip), a1 = below.template get<kRegister>(p.flip),
                   a2 = above.template get<kRegister + 1>(p.flip), a3 = below.template get<kRegister + 1>(p.flip);
#pragma unroll
    for (int n = 0; n < Tiles; ++n) {
      if (product % 2 == 0) b[n] = x.first[n][(at + product / 2) * x.stride[n]];
      const uint32_t b0 = product % 2 ? b[n].z : b[n].x, b1 = product % 2 ? b[n].w : b[n].y;
      multiply_add(sums.products[n], a0, a1, a2, a3, b0, b1);
    }
  };
  each(multiply, std::make_integer_sequence<int, kGranuleProducts>());
  if (p.sums) {  // in a loop of its own, so that grids that need no sums pay for a branch only
#pragma unroll
    for (int product = i * kGranuleProducts; product < (i + 1) * kGranuleProducts; ++product)
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
        const uint2* const half = reinterpret_cast<const uint2*>(x.first[n] + (at + product / 2) * x.stride[n]);
        add_columns(sums.x_sums[n], half[product % 2].x, half[product % 2].y);
      }
  }
}

// Multiplies a stage, and adds groups that end in it to the total.
template <int Bits, int Tiles>
__device__ __forceinline__ void multiply_stage(const LowbitGemv& p, const WarpShare& share, int stage,
                                               const uint32_t* words, const ActivationOperands<Tiles>& x,
                                               const int64_t (&rows)[2], int t, GroupPosition& position,
                                               Sums<Tiles>& sums) {
  constexpr LowbitLayout kLayout(Bits);
  const bool split = p.group_granules == 0;
  const int at = (stage - share.chunk_first) * (kLayout.products / 2);
  const auto ends = [&](int i, int left) { return left == 0 || (stage == share.end - 1 && i == kLayout.granules - 1); };
  // The scales of the groups that end here, loaded early where there are registers to hold them.
  LowbitGemv::RawScale raw[Tiles == 1 ? kLayout.granules : 1][2];
  if (Tiles == 1 && !split) {
#pragma unroll
    for (int i = 0, group = position.group, left = position.left; i < kLayout.granules; ++i) {
      if (!ends(i, --left)) continue;
      raw[i][0] = p.load_raw(rows[0], group);
      raw[i][1] = p.load_raw(rows[1], group++);
      left = p.group_granules;
    }
  }
  uint4 b[Tiles];
#pragma unroll
  for (int i = 0; i < kLayout.granules; ++i) {
    multiply_granule<Bits, Tiles>(p, words, i, at, x, b, sums);
    if (!split && !ends(i, --position.left)) continue;
    LowbitGemv::Affine affine[4];
    if (split) {
      // Activation row 8 n + 2 t + {0, 1} belongs to lane (2 t + {0, 1}) % 4.
      const int run = (stage * kLayout.granules + i) * 4 + 2 * t % 4;
#pragma unroll
      for (int k = 0; k < 4; ++k) affine[k] = p.affine(p.load_raw(rows[k / 2], (run + k % 2) / p.group_lanes));
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        affine[k] = p.affine(Tiles == 1 ? raw[Tiles == 1 ? i : 0][k / 2] : p.load_raw(rows[k / 2], position.group));
      ++position.group;
      position.left = p.group_granules;
    }
    sums.end_group(affine);
  }
}

}  // namespace

template <int Bits, int Tiles>
__global__ void __launch_bounds__(kGemvThreads, 1) lowbit_gemv_kernel(const LowbitGemv p) {
  constexpr LowbitLayout kLayout(Bits);
  constexpr SharedPlan kShared(kLayout, Tiles);
  uint8_t* const shared = dynamic_shared();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int g = lane / 4, t = lane % 4;
  const WarpShare share(p, warp);
  StageRing<Bits> ring(p, share, shared + warp * kSlots * kShared.slot);
#pragma unroll 1
  for (int i = 0; i < kSlots - 1; ++i) ring.fetch(p, share, kShared.slot);

  // Weights are on their way. The kernel that writes x may still be running.
  wait_for_earlier_kernel();
  uint4* const x = reinterpret_cast<uint4*>(shared + kShared.x);
  const int stage_vectors = kLayout.products * 2 * p.act_rows;
  const uint4* const from = p.x + int64_t{share.chunk_first} * stage_vectors;
  for (int i = thread; i < share.chunk_stages * stage_vectors; i += kGemvThreads) copy_16_async(x + i, from + i, 16);
  copy_commit();
  copy_wait<0>();
  uint4* const zeros = reinterpret_cast<uint4*>(shared + kShared.zeros);
  if (thread == 0) zeros->x = zeros->y = zeros->z = zeros->w = 0;
  __syncthreads();

  const ActivationOperands<Tiles> operands(p, x, zeros, g, t);
  Sums<Tiles> sums;
  int slot = 0;
  for (int round = share.block; round < p.rounds; round += p.row_blocks) {
    const int64_t first_row = share.first_row(round);
    const int64_t rows[2] = {min(first_row + g, p.rows - 1), min(first_row + g + 8, p.rows - 1)};
    sums.start();
    GroupPosition position(p, share, kLayout.granules);
    for (int stage = share.first; stage < share.end; ++stage) {
      copy_wait<kSlots - 2>();
      __syncwarp();  // all copies of the stage have arrived, and all lanes have read the slot before this one
      ring.fetch(p, share, kShared.slot);
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(ring.slots + slot * kShared.slot);
      slot = (slot + 1) % kSlots;
      multiply_stage<Bits, Tiles>(p, share, stage, words, operands, rows, t, position, sums);
    }
    write_round(p, sums.total, p.unit, reinterpret_cast<float*>(shared + kShared.sums), share.chunk, round);
    __syncthreads();
  }
  copy_wait<0>();
}

// Adds the partial sums of the chunks of K.
__global__ void __launch_bounds__(kThreads) lowbit_gemv_finish_kernel(const LowbitGemv p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, outputs = p.tokens * p.rows;
  if (i >= outputs) return;
  float sum = 0;
  for (int chunk = 0; chunk < p.chunks; ++chunk) sum += p.partial[chunk * outputs + i];
  p.write(i / p.rows, i % p.rows, sum);
}

// Any group size: a warp for each row, one code at a time. For groups that are not whole granules or lanes of them.
template <class X>
__global__ void __launch_bounds__(kThreads)
    lowbit_gemv_any_kernel(const LowbitGemv p, const X* x, int bits, float qmax) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t r = min(row, p.rows - 1), group_cols = p.cols / p.groups;
  const uint8_t* const codes = p.packed + r * p.row_bytes;
  float sums[kMaxTokens] = {};
  for (int64_t col = lane; col < p.cols; col += kWarp) {
    const int64_t bit = col * bits;
    const int offset = static_cast<int>(bit % 8);
    unsigned code = __ldg(codes + bit / 8) >> offset;
    if (offset + bits > 8) code |= static_cast<unsigned>(__ldg(codes + bit / 8 + 1)) << (8 - offset);
    const LowbitGemv::Affine affine = p.affine(p.load_raw(r, col / group_cols));
    const float value = (static_cast<float>(code & ((1u << bits) - 1)) + affine.shift) * affine.step;
#pragma unroll
    for (int token = 0; token < kMaxTokens; ++token) {
      if (token >= p.tokens) break;
      float activation = widen(x[token * p.cols + col]);
      if (qmax != 0) {
        const float unit = __ldg(p.unit + token);
        activation = rintf(min_of(qmax, max_of(-qmax, activation / unit))) * unit;
      }
      sums[token] = fmaf(activation, value, sums[token]);
    }
  }
#pragma unroll
  for (int token = 0; token < kMaxTokens; ++token) {
    for (int step = kWarp / 2; step > 0; step /= 2) sums[token] += __shfl_xor_sync(0xFFFFFFFFu, sums[token], step);
    if (lane == 0 && token < p.tokens && row < p.rows) p.write(token, row, sums[token]);
  }
}

namespace {

template <int Bits, int Tiles>
cudaError_t start(const LowbitGemv& p, const LowbitGemvPlan& plan, cudaStream_t stream) {
  const auto kernel = lowbit_gemv_kernel<Bits, Tiles>;
  static PreparedKernel prepared;
  const cudaError_t error = prepared.prepare(kernel, plan.device);
  if (error != cudaSuccess) return error;
  const size_t shared = SharedPlan(plan.layout, Tiles).x + plan.shared_x(p);
  return launch_as(prepared.dependent(plan.device), kernel, int64_t{p.chunks} * p.row_blocks, kGemvThreads, shared,
                   stream, p);
}

template <class F, int... Bits>
cudaError_t with_bits(int bits, F f, std::integer_sequence<int, Bits...>) {
  cudaError_t error = cudaErrorInvalidValue;
  ((bits == Bits + 1 ? void(error = f(std::integral_constant<int, Bits + 1>{})) : void()), ...);
  return error;
}

// A pass of a call that is not direct: x becomes rows of int8 in the workspace, which another kernel multiplies.
cudaError_t multiply_limbs(const LowbitGemvPlan& plan, LowbitGemv p, const void* tokens, char* workspace,
                           cudaStream_t stream) {
  const LowbitLinearCall& call = plan.call;
  float* const unit = reinterpret_cast<float*>(workspace);
  uint4* const x = reinterpret_cast<uint4*>(workspace + LowbitGemvPlan::kUnitBytes);
  p.unit = unit;
  p.x = x;
  const int64_t items = int64_t{p.stages} * plan.layout.products * 2;
  const int pieces = static_cast<int>(std::clamp<int64_t>((items + kThreads - 1) / kThreads, 1, 16));
  const cudaError_t error =
      lowbit_limbs({tokens, x, unit, call.cols, p.tokens, call.bits, call.act_bits, p.stages, pieces, plan.limbs},
                   call.x_type, stream);
  if (error != cudaSuccess) return error;
  if (plan.any) {
    return with_types(call.x_type, call.x_type, [&](auto types) {
      // float64 is not served, but with_types instantiates it.
      using X = std::conditional_t<sizeof(typename decltype(types)::W) == 8, float, typename decltype(types)::W>;
      const float qmax = static_cast<float>(call.act_bits ? (1 << (call.act_bits - 1)) - 1 : 0);
      return launch(lowbit_gemv_any_kernel<X>, (call.rows + 7) / 8, kThreads, 0, stream, p,
                    static_cast<const X*>(tokens), call.bits, qmax);
    });
  }
  return with_bits(
      call.bits,
      [&](auto bits) {
        switch (plan.act_tiles(p)) {
          case 1:
            return start<bits, 1>(p, plan, stream);
          case 2:
            return start<bits, 2>(p, plan, stream);
          default:
            return start<bits, max_act_tiles(bits)>(p, plan, stream);
        }
      },
      std::make_integer_sequence<int, 8>());
}

}  // namespace

bool lowbit_gemv_serves(const LowbitLinearCall& call) {
  return call.tokens <= kMaxTokens && call.cols > 0 && !call.offsets && call.x_type != DType::f64 &&
         (!call.bias || call.bias_type != DType::f64);
}

cudaError_t lowbit_gemv_workspace(const LowbitLinearCall& call, size_t* bytes) {
  *bytes = 0;
  if (call.tokens == 0 || call.rows == 0) return cudaSuccess;
  DeviceLimits device;
  const cudaError_t error = device.query();
  if (error != cudaSuccess) return error;
  const LowbitGemvPlan plan(call, device);
  *bytes = plan.bytes(plan.pass(0));  // no later pass has more tokens
  return cudaSuccess;
}

cudaError_t lowbit_gemv(const LowbitLinearCall& call, void* workspace, cudaStream_t stream) {
  if (!lowbit_gemv_serves(call)) return cudaErrorInvalidValue;
  if (call.tokens == 0 || call.rows == 0) return cudaSuccess;
  DeviceLimits device;
  cudaError_t error = device.query();
  const LowbitGemvPlan plan(call, device);
  for (int64_t first = 0; error == cudaSuccess && first < call.tokens; first += plan.pass_tokens) {
    LowbitGemv p = plan.pass(first);
    char* const memory = static_cast<char*>(workspace);
    if (p.chunks > 1) p.partial = reinterpret_cast<float*>(memory + plan.x_bytes(p));
    const void* const tokens =
        static_cast<const char*>(call.x) + first * call.cols * (call.x_type == DType::f32 ? 4 : 2);
    p.x_16 = tokens;
    error = plan.direct ? lowbit_gemv16(p, plan, stream) : multiply_limbs(plan, p, tokens, memory, stream);
    if (error == cudaSuccess && p.chunks > 1)
      error = launch(lowbit_gemv_finish_kernel, (p.tokens * p.rows + kThreads - 1) / kThreads, kThreads, 0, stream, p);
  }
  return error;
}

}  // namespace qk::cuda
