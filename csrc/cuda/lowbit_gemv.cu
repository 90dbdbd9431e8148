// y = x W^T + bias for at most eight tokens and packed W. This is what decoding is made of, and its bound is reading W
// once. Three things decide whether it gets there:
//
// - Bytes in flight. 3.35 TB/s over 132 multiprocessors at 0.8 us of loaded latency are 20 KiB each. Sixteen warps keep
//   three stages of sixteen rows and 64 bytes on their way to shared memory: 48 KiB, which in registers would be 24 for
//   each thread.
// - Instructions. At 1 bit and 80% of that bandwidth a multiprocessor has to process 90 codes a cycle, and issues 128
//   lanes of instructions, 64 of them logic; one multiplication for each code is out of the question. Tensor cores
//   multiply sixteen rows by eight activation rows of int8 (lowbit_limbs.h) for the price of one activation row, so
//   eight tokens cost what one does. A code costs half an instruction to decode (lowbit_layout.h), half of what 16-bit
//   operands take.
// - x. A kernel of its own makes its limbs, and each block stages them once; blocks stay and walk over rows. (Limbs
// that
//   each block made for itself took 2 to 5 us longer for each token on an H100.)
//
// Sums are integers, multiplied with a scale for each group. Warps that share rows, then chunks of K, are added in a
// fixed order. The result depends on the device only where x does not fit into its shared memory and K is cut.
#include <atomic>

#include "lowbit_gemv.h"
#include "lowbit_limbs.h"
#include "lowbit_linear.h"

namespace qk::cuda {
namespace {

// Starts the copies of a stage of sixteen rows to shared memory. Nothing beyond the end of a row is read; it becomes 0.
template <int Bits>
__device__ __forceinline__ void fetch_stage(const LowbitGemv& p, int64_t first_row, int stage, uint8_t* slot) {
  constexpr LowbitLayout kLayout(Bits);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int i = lane; i < kTileRows * kLayout.stage_chunks; i += kWarp) {
    const int row = i / kLayout.stage_chunks, chunk = i % kLayout.stage_chunks;
    const int64_t r = first_row + row < p.rows ? first_row + row : p.rows - 1;
    const int64_t offset = int64_t{stage} * kLayout.stage_bytes + chunk * 16, left = p.row_bytes - offset;
    const uint8_t* const from = p.packed + r * p.row_bytes + (left > 0 ? offset : 0);
    uint8_t* const to = slot + row * kLayout.pitch + chunk * 16;
    if (p.copy == 16) {
      copy_16_async(to, from, left > 0 ? 16 : 0);
      continue;
    }
    if (p.copy == 4) {
#pragma unroll
      for (int w = 0; w < 16; w += 4) copy_4_async(to + w, left > w ? from + w : from, left > w ? 4 : 0);
      continue;
    }
#pragma unroll 1
    for (int w = 0; w < 16; w += 4) {
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (left > w + j) word |= static_cast<uint32_t>(__ldg(from + w + j)) << 8 * j;
      *reinterpret_cast<uint32_t*>(to + w) = word;
    }
  }
}

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

// Calls f(0), f(1), ... with compile-time constants.
template <class F, int... I>
__device__ __forceinline__ void each(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

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

// Adds the sums of the warps that share rows, in a fixed order, and writes the outputs of a round of rows.
template <int Tiles>
__device__ __forceinline__ void write_round(const LowbitGemv& p, const Sums<Tiles>& sums, float* partial, int chunk,
                                            int round) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, g = thread % kWarp / 4, t = thread % 4;
  const int tiles = kGemvWarps / p.warps_per_row, copies = p.group_granules == 0 ? 4 : 1;
  // [warp][row][activation row]
  float* const own = partial + warp * kTileRows * 8 * Tiles;
#pragma unroll
  for (int n = 0; n < Tiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) own[(g + i / 2 * 8) * 8 * Tiles + 8 * n + 2 * t + i % 2] = sums.total[n][i];
  __syncthreads();
  // Each output is added up by warps_per_row neighbouring threads of a warp.
  for (int i = thread; i < tiles * kTileRows * p.tokens * p.warps_per_row; i += kGemvThreads) {
    const int from_part = i % p.warps_per_row, output = i / p.warps_per_row;
    const int row = output % kTileRows, token = output / kTileRows % p.tokens, tile = output / kTileRows / p.tokens;
    const float* const act_rows =
        partial + ((tile * p.warps_per_row + from_part) * kTileRows + row) * 8 * Tiles + token * p.limbs * copies;
    float sum = 0;
    for (int d = p.limbs - 1; d >= 0; --d) {
      float limb = 0;
      for (int k = 0; k < copies; ++k) limb += act_rows[d * copies + k];
      sum = fmaf(sum, 256.0f, limb);
    }
    for (int offset = p.warps_per_row / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
    const int64_t r = (int64_t{round} * tiles + tile) * kTileRows + row;
    if (from_part != 0 || r >= p.rows) continue;
    sum *= p.unit[token];
    if (p.partial)
      p.partial[(int64_t{chunk} * p.tokens + token) * p.rows + r] = sum;
    else
      p.write(token, r, sum);
  }
}

// What a warp multiplies: stages [first, end) of the sixteen rows from first_row(round) on, in each of its rounds.
struct WarpShare {
  int chunk, block, chunk_first, chunk_stages, first, end, tiles, tile;

  __device__ __forceinline__ WarpShare(const LowbitGemv& p, int warp) {
    chunk = static_cast<int>(blockIdx.x) % p.chunks;
    block = static_cast<int>(blockIdx.x) / p.chunks;
    chunk_first = chunk * p.chunk_stages;
    chunk_stages = min(p.chunk_stages, p.stages - chunk_first);
    const int part = warp % p.warps_per_row;
    tiles = kGemvWarps / p.warps_per_row;
    tile = warp / p.warps_per_row;
    first = chunk_first + chunk_stages * part / p.warps_per_row;
    end = chunk_first + chunk_stages * (part + 1) / p.warps_per_row;
  }
  __device__ __forceinline__ int64_t first_row(int round) const { return (int64_t{round} * tiles + tile) * kTileRows; }
};

// The ring of kSlots stages that a warp has in shared memory, and the stage that is fetched next.
template <int Bits>
struct StageRing {
  uint8_t* slots;
  int next_round, next_stage, next_slot;

  __device__ __forceinline__ StageRing(const LowbitGemv& p, const WarpShare& share, uint8_t* slots_)
      : slots(slots_),
        next_round(share.first < share.end ? share.block : p.rounds),
        next_stage(share.first),
        next_slot(0) {}
  __device__ __forceinline__ void fetch(const LowbitGemv& p, const WarpShare& share, int slot_bytes) {
    if (next_round < p.rounds) {
      fetch_stage<Bits>(p, share.first_row(next_round), next_stage, slots + next_slot * slot_bytes);
      next_slot = (next_slot + 1) % kSlots;
      if (++next_stage == share.end) {
        next_stage = share.first;
        next_round += p.row_blocks;
      }
    }
    copy_commit();
  }
};

// The group that a stage begins in, and the granules to its end. Unused where groups are smaller than granules.
struct GroupPosition {
  int group = 0, left = 0;

  __device__ __forceinline__ GroupPosition(const LowbitGemv& p, const WarpShare& share, int granules) {
    if (p.group_granules == 0 || share.first >= share.end) return;
    group = share.first * granules / p.group_granules;
    left = p.group_granules - share.first * granules % p.group_granules;
  }
};

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
    write_round(p, sums, reinterpret_cast<float*>(shared + kShared.sums), share.chunk, round);
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
cudaError_t start(const LowbitGemv& p, const LowbitLayout& layout, const DeviceLimits& device, cudaStream_t stream) {
  const auto kernel = lowbit_gemv_kernel<Bits, Tiles>;
  // Once for each device: allow the shared memory, and find out whether a launch may be dependent there, which it may
  // if the code was compiled with the instruction that waits.
  static std::atomic<uint64_t> prepared{0}, dependent{0};
  const uint64_t bit = uint64_t{1} << (device.id & 63);
  if (device.id > 63 || !(prepared & bit)) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared);
    if (error != cudaSuccess) return error;
    if (attributes.ptxVersion >= 90) dependent |= bit;
    prepared |= bit;
  }
  const size_t shared =
      SharedPlan(layout, Tiles).x + static_cast<size_t>(p.chunk_stages) * layout.stage_cols * p.act_rows;
  return launch_as(device.id <= 63 && (dependent & bit), kernel, int64_t{p.chunks} * p.row_blocks, kGemvThreads, shared,
                   stream, p);
}

template <class F, int... Bits>
cudaError_t with_bits(int bits, F f, std::integer_sequence<int, Bits...>) {
  cudaError_t error = cudaErrorInvalidValue;
  ((bits == Bits + 1 ? void(error = f(std::integral_constant<int, Bits + 1>{})) : void()), ...);
  return error;
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
    float* const unit = reinterpret_cast<float*>(memory);
    uint4* const x = reinterpret_cast<uint4*>(memory + LowbitGemvPlan::kUnitBytes);
    p.unit = unit;
    p.x = x;
    if (p.chunks > 1) p.partial = reinterpret_cast<float*>(memory + LowbitGemvPlan::kUnitBytes + plan.x_bytes(p));
    const void* const tokens =
        static_cast<const char*>(call.x) + first * call.cols * (call.x_type == DType::f32 ? 4 : 2);
    const int64_t items = int64_t{p.stages} * plan.layout.products * 2;
    const int pieces = static_cast<int>(std::clamp<int64_t>((items + kThreads - 1) / kThreads, 1, 16));
    error = lowbit_limbs({tokens, x, unit, call.cols, p.tokens, call.bits, call.act_bits, p.stages, pieces, plan.limbs},
                         call.x_type, stream);
    if (error != cudaSuccess) return error;

    if (plan.any) {
      error = with_types(call.x_type, call.x_type, [&](auto types) {
        // float64 is not served, but with_types instantiates it.
        using X = std::conditional_t<sizeof(typename decltype(types)::W) == 8, float, typename decltype(types)::W>;
        const float qmax = static_cast<float>(call.act_bits ? (1 << (call.act_bits - 1)) - 1 : 0);
        return launch(lowbit_gemv_any_kernel<X>, (call.rows + 7) / 8, kThreads, 0, stream, p,
                      static_cast<const X*>(tokens), call.bits, qmax);
      });
      continue;
    }
    error = with_bits(
        call.bits,
        [&](auto bits) {
          switch (plan.act_tiles(p)) {
            case 1:
              return start<bits, 1>(p, plan.layout, device, stream);
            case 2:
              return start<bits, 2>(p, plan.layout, device, stream);
            default:
              return start<bits, max_act_tiles(bits)>(p, plan.layout, device, stream);
          }
        },
        std::make_integer_sequence<int, 8>());
    if (error == cudaSuccess && p.chunks > 1)
      error = launch(lowbit_gemv_finish_kernel, (p.tokens * p.rows + kThreads - 1) / kThreads, kThreads, 0, stream, p);
  }
  return error;
}

}  // namespace qk::cuda
