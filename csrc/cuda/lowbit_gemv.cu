// y = x W^T + bias for at most eight tokens and packed W: what decoding is made of, and bound by reading W once.
//
// Three things decide. Bytes in flight: 3.35 TB/s over 132 multiprocessors at 0.8 us of loaded latency are 20 KiB each.
// Sixteen warps keep three stages of sixteen rows and 64 bytes on their way to shared memory, 48 KiB, which in
// registers would be 24 for each thread. Instructions: at 1 bit and 80% of that bandwidth a multiprocessor meets 90
// codes a cycle and issues 128 lanes of instructions, 64 of them logic; one multiplication for each code is out of the
// question. Tensor cores multiply sixteen rows by eight lines of int8 (lowbit_digits.h) for the price of one, which
// also makes eight tokens cost what one does, and a code costs half an instruction to decode (lowbit_layout.h), half of
// what 16-bit operands take. And x: staged once, by blocks that stay and walk over rows.
//
// The sums are those of integers, with a scale for each group; warps that share rows, then pieces of K, are added in a
// fixed order. The result depends on the device only where x does not fit its shared memory and K is cut.
#include <atomic>

#include "kernels.h"
#include "lowbit_digits.h"
#include "lowbit_gemv.h"

namespace qk::cuda {

// Starts the copies of a stage of sixteen rows to shared memory; what lies beyond a row is not read.
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

// A warp's sums for sixteen rows and `Tiles` times eight lines, as ptx.h spreads them over lanes.
template <int Tiles>
struct Sums {
  int32_t products[Tiles][4], lines[Tiles][2];
  float total[Tiles][4];

  __device__ __forceinline__ void start_group() {
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) products[n][i] = lines[n][i % 2] = 0;
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
        const float number = static_cast<float>(products[n][i]), line = static_cast<float>(lines[n][i % 2]);
        total[n][i] = fmaf(affine[i].step, fmaf(affine[i].shift, line, number), total[n][i]);
      }
    start_group();
  }
};

// f(0), f(1), ... as constants.
template <class F, int... I>
__device__ __forceinline__ void each(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// The products of granule i of a stage, whose first product has x at `at` pairs of products.
template <int Bits, int Tiles>
__device__ __forceinline__ void multiply_granule(const LowbitGemv& p, const uint32_t* words, int i, int at,
                                                 const uint4* const (&operand)[Tiles], const int (&stride)[Tiles],
                                                 uint4 (&b)[Tiles], Sums<Tiles>& sums) {
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
      if (product % 2 == 0) b[n] = operand[n][(at + product / 2) * stride[n]];
      const uint32_t b0 = product % 2 ? b[n].z : b[n].x, b1 = product % 2 ? b[n].w : b[n].y;
      multiply_add(sums.products[n], a0, a1, a2, a3, b0, b1);
    }
  };
  each(multiply, std::make_integer_sequence<int, kGranuleProducts>());
  if (p.sums) {  // apart, so that grids that need none pay for a branch only
#pragma unroll
    for (int product = i * kGranuleProducts; product < (i + 1) * kGranuleProducts; ++product)
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
        const uint2* const half = reinterpret_cast<const uint2*>(operand[n] + (at + product / 2) * stride[n]);
        add_columns(sums.lines[n], half[product % 2].x, half[product % 2].y);
      }
  }
}

// Adds what warps have of the same rows, in a fixed order, and writes a round of rows.
template <int Tiles>
__device__ __forceinline__ void write_round(const LowbitGemv& p, const Sums<Tiles>& sums, float* partial, int chunk,
                                            int round) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, g = thread % kWarp / 4, t = thread % 4;
  const int tiles = kGemvWarps / p.warps_per_row, copies = p.group_granules == 0 ? 4 : 1;
  // [warp][row][line]
  float* const own = partial + warp * kTileRows * 8 * Tiles;
#pragma unroll
  for (int n = 0; n < Tiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) own[(g + i / 2 * 8) * 8 * Tiles + 8 * n + 2 * t + i % 2] = sums.total[n][i];
  __syncthreads();
  // warps_per_row threads for each output, which are neighbours in a warp.
  for (int i = thread; i < tiles * kTileRows * p.tokens * p.warps_per_row; i += kGemvThreads) {
    const int from_part = i % p.warps_per_row, output = i / p.warps_per_row;
    const int row = output % kTileRows, token = output / kTileRows % p.tokens, tile = output / kTileRows / p.tokens;
    const float* const line =
        partial + ((tile * p.warps_per_row + from_part) * kTileRows + row) * 8 * Tiles + token * p.digits * copies;
    float sum = 0;
    for (int d = p.digits - 1; d >= 0; --d) {
      float digit = 0;
      for (int k = 0; k < copies; ++k) digit += line[d * copies + k];
      sum = fmaf(sum, 256.0f, digit);
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

template <int Bits, int Tiles>
__global__ void __launch_bounds__(kGemvThreads, 1) lowbit_gemv_kernel(const LowbitGemv p) {
  constexpr LowbitLayout kLayout(Bits);
  constexpr SharedPlan kShared(kLayout, Tiles);
  uint8_t* const shared = dynamic_shared();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int g = lane / 4, t = lane % 4;

  // Stages first ... end - 1 are this warp's, in rows of tile `round * tiles + warp / warps_per_row`.
  const int chunk = static_cast<int>(blockIdx.x) % p.chunks, block = static_cast<int>(blockIdx.x) / p.chunks;
  const int chunk_first = chunk * p.chunk_stages;
  const int chunk_stages = min(p.chunk_stages, p.stages - chunk_first);
  const int part = warp % p.warps_per_row, tiles = kGemvWarps / p.warps_per_row;
  const int first = chunk_first + chunk_stages * part / p.warps_per_row;
  const int end = chunk_first + chunk_stages * (part + 1) / p.warps_per_row;
  const auto row_of = [&](int round) { return (int64_t{round} * tiles + warp / p.warps_per_row) * kTileRows; };

  uint8_t* const ring = shared + warp * kSlots * kShared.slot;
  int next_round = first < end ? block : p.rounds;
  int next_stage = first, next_slot = 0;
  const auto fetch = [&] {
    if (next_round < p.rounds) {
      fetch_stage<Bits>(p, row_of(next_round), next_stage, ring + next_slot * kShared.slot);
      next_slot = (next_slot + 1) % kSlots;
      if (++next_stage == end) {
        next_stage = first;
        next_round += p.row_blocks;
      }
    }
    copy_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kSlots - 1; ++i) fetch();

  // Weights are on their way; now x, by ordinary loads: it is being written while this kernel runs.
  wait_for_earlier_kernel();
  uint4* const x = reinterpret_cast<uint4*>(shared + kShared.x);
  const int stage_vectors = kLayout.products * 2 * p.lines;
  const uint4* const from = p.x + int64_t{chunk_first} * stage_vectors;
  for (int i = thread; i < chunk_stages * stage_vectors; i += kGemvThreads) x[i] = from[i];
  uint4* const zeros = reinterpret_cast<uint4*>(shared + kShared.zeros);
  if (thread == 0) zeros->x = zeros->y = zeros->z = zeros->w = 0;
  __syncthreads();

  // Where this lane finds its operand of x, of line n * 8 + g, or zeros.
  const bool split = p.group_granules == 0;
  const uint4* operand[Tiles];
  int stride[Tiles];
#pragma unroll
  for (int n = 0; n < Tiles; ++n) {
    const int line = split ? 2 * n + g / 4 : 8 * n + g;
    const bool mine = line < p.lines && (!split || g % 4 == t);
    stride[n] = mine ? 4 * p.lines : 0;
    operand[n] = mine ? x + line * 4 + t : zeros;
  }

  Sums<Tiles> sums;
  int slot = 0;
  for (int round = block; round < p.rounds; round += p.row_blocks) {
    const int64_t first_row = row_of(round);
    const int64_t rows[2] = {min(first_row + g, p.rows - 1), min(first_row + g + 8, p.rows - 1)};
    sums.start();
    int group = 0, left = 0;  // granules to the end of the group
    if (!split && first < end) {
      group = first * kLayout.granules / p.group_granules;
      left = p.group_granules - first * kLayout.granules % p.group_granules;
    }
    for (int stage = first; stage < end; ++stage) {
      copy_wait<kSlots - 2>();
      __syncwarp();  // all copies have come, and the slot before this one has been read
      fetch();
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(ring + slot * kShared.slot);
      slot = (slot + 1) % kSlots;
      const int at = (stage - chunk_first) * (kLayout.products / 2);
      const auto ends = [&](int i, int rest) { return rest == 0 || (stage == end - 1 && i == kLayout.granules - 1); };
      // Scales of the groups that end here, asked for early where there are registers to hold them.
      LowbitGemv::Asked asked[Tiles == 1 ? kLayout.granules : 1][2];
      if (Tiles == 1 && !split) {
#pragma unroll
        for (int i = 0, at = group, rest = left; i < kLayout.granules; ++i) {
          if (!ends(i, --rest)) continue;
          asked[i][0] = p.ask(rows[0], at);
          asked[i][1] = p.ask(rows[1], at++);
          rest = p.group_granules;
        }
      }
      uint4 b[Tiles];
#pragma unroll
      for (int i = 0; i < kLayout.granules; ++i) {
        multiply_granule<Bits, Tiles>(p, words, i, at, operand, stride, b, sums);
        if (!split && !ends(i, --left)) continue;
        LowbitGemv::Affine affine[4];
        if (split) {
          // Line 8 n + 2 t + {0, 1} belongs to lane (2 t + {0, 1}) % 4.
          const int run = (stage * kLayout.granules + i) * 4 + 2 * t % 4;
#pragma unroll
          for (int k = 0; k < 4; ++k) affine[k] = p.affine(p.ask(rows[k / 2], (run + k % 2) / p.group_lanes));
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k)
            affine[k] = p.affine(Tiles == 1 ? asked[Tiles == 1 ? i : 0][k / 2] : p.ask(rows[k / 2], group));
          ++group;
          left = p.group_granules;
        }
        sums.end_group(affine);
      }
    }

    write_round(p, sums, reinterpret_cast<float*>(shared + kShared.sums), chunk, round);
    __syncthreads();
  }
  copy_wait<0>();
}

// Adds the chunks of K.
__global__ void __launch_bounds__(kThreads) lowbit_gemv_finish_kernel(const LowbitGemv p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, outputs = p.tokens * p.rows;
  if (i >= outputs) return;
  float sum = 0;
  for (int chunk = 0; chunk < p.chunks; ++chunk) sum += p.partial[chunk * outputs + i];
  p.write(i / p.rows, i % p.rows, sum);
}

// Any group size, a warp for each row and one code at a time: for groups that no granule fits.
template <class X>
__global__ void __launch_bounds__(kThreads)
    lowbit_gemv_any_kernel(const LowbitGemv p, const X* x, int bits, float qmax) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t r = min(row, p.rows - 1), group_cols = p.cols / p.groups;
  const uint8_t* const codes = p.packed + r * p.row_bytes;
  float sums[kMostTokens] = {};
  for (int64_t col = lane; col < p.cols; col += kWarp) {
    const int64_t bit = col * bits;
    const int offset = static_cast<int>(bit % 8);
    unsigned code = __ldg(codes + bit / 8) >> offset;
    if (offset + bits > 8) code |= static_cast<unsigned>(__ldg(codes + bit / 8 + 1)) << (8 - offset);
    const LowbitGemv::Affine affine = p.affine(p.ask(r, col / group_cols));
    const float value = (static_cast<float>(code & ((1u << bits) - 1)) + affine.shift) * affine.step;
#pragma unroll
    for (int token = 0; token < kMostTokens; ++token) {
      if (token >= p.tokens) break;
      float number = widen(x[token * p.cols + col]);
      if (qmax != 0) {
        const float unit = __ldg(p.unit + token);
        number = rintf(min_of(qmax, max_of(-qmax, number / unit))) * unit;
      }
      sums[token] = fmaf(number, value, sums[token]);
    }
  }
#pragma unroll
  for (int token = 0; token < kMostTokens; ++token) {
    for (int step = kWarp / 2; step > 0; step /= 2) sums[token] += __shfl_xor_sync(0xFFFFFFFFu, sums[token], step);
    if (lane == 0 && token < p.tokens && row < p.rows) p.write(token, row, sums[token]);
  }
}

namespace {

template <int Bits, int Tiles>
cudaError_t start(const LowbitGemv& p, const LowbitLayout& layout, const Device& device, cudaStream_t stream) {
  const auto kernel = lowbit_gemv_kernel<Bits, Tiles>;
  // What is done once for each device, and whether a launch may be dependent there: if the code knows how to wait.
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
  const size_t shared = SharedPlan(layout, Tiles).x + static_cast<size_t>(p.chunk_stages) * layout.stage_cols * p.lines;
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
  return call.tokens <= kMostTokens && call.cols > 0 && !call.offsets && call.x_type != DType::f64 &&
         (!call.bias || call.bias_type != DType::f64);
}

cudaError_t lowbit_gemv_workspace(const LowbitLinearCall& call, size_t* bytes) {
  *bytes = 0;
  if (call.tokens == 0 || call.rows == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = device.ask();
  if (error != cudaSuccess) return error;
  const LowbitPlan plan(call, device);
  *bytes = plan.bytes(plan.pass(0));  // no later pass has more tokens
  return cudaSuccess;
}

cudaError_t lowbit_gemv(const LowbitLinearCall& call, void* workspace, cudaStream_t stream) {
  if (!lowbit_gemv_serves(call)) return cudaErrorInvalidValue;
  if (call.tokens == 0 || call.rows == 0) return cudaSuccess;
  Device device;
  cudaError_t error = device.ask();
  const LowbitPlan plan(call, device);
  for (int64_t first = 0; error == cudaSuccess && first < call.tokens; first += plan.pass_tokens) {
    LowbitGemv p = plan.pass(first);
    char* const memory = static_cast<char*>(workspace);
    float* const unit = reinterpret_cast<float*>(memory);
    uint4* const x = reinterpret_cast<uint4*>(memory + LowbitPlan::kUnitBytes);
    p.unit = unit;
    p.x = x;
    if (p.chunks > 1) p.partial = reinterpret_cast<float*>(memory + LowbitPlan::kUnitBytes + plan.x_bytes(p));
    const void* const tokens =
        static_cast<const char*>(call.x) + first * call.cols * (call.x_type == DType::f32 ? 4 : 2);
    const int64_t items = int64_t{p.stages} * plan.layout.products * 2;
    const int pieces = static_cast<int>(std::clamp<int64_t>((items + kThreads - 1) / kThreads, 1, 16));
    error =
        lowbit_digits({tokens, x, unit, call.cols, p.tokens, call.bits, call.act_bits, p.stages, pieces, plan.digits},
                      call.x_type, stream);
    if (error != cudaSuccess) return error;

    if (plan.any) {
      error = with_types(call.x_type, call.x_type, [&](auto types) {
        // float64 is not served.
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
          return plan.line_tiles(p) == 1 ? start<bits, 1>(p, plan.layout, device, stream)
                                         : start<bits, most_line_tiles(bits)>(p, plan.layout, device, stream);
        },
        std::make_integer_sequence<int, 8>());
    if (error == cudaSuccess && p.chunks > 1)
      error = launch(lowbit_gemv_finish_kernel, (p.tokens * p.rows + kThreads - 1) / kThreads, kThreads, 0, stream, p);
  }
  return error;
}

}  // namespace qk::cuda
