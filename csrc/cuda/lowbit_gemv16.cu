// y = x W^T for at most eight tokens of 16 bits and W packed to 1, 2 or 4 bits: the decode kernel that multiplies x as
// it is (LowbitGemvPlan says which calls are these).
//
// lowbit_gemv.cu multiplies integers of 8 bits. It decodes more codes with an instruction, but x has to become integers
// first, in a kernel of its own, and takes three of the eight columns of a product for each token. On an H100 a call
// took 12 us (4096 columns) to 25 us (28672 columns) longer than reading the weight, whatever its width. Here x is
// multiplied in its own type, so one launch is enough, and up to eight tokens are the eight columns of one product.
//
// The order of columns in a product is free if both operands agree. Half a word of codes and the other half are the two
// halves of an operand's registers: with H = 16 / bits, register i has codes i and i + H of the lane's word. x comes
// into shared memory in that order.
//
// Sums are float32. Tensor cores round them towards zero, so after eight products they are added to a float32 that
// rounds to nearest. Groups are multiplied with their scales, then warps and chunks of K are added, in a fixed order.
#include <cmath>
#include <type_traits>

#include "lowbit_gemv.h"
#include "lowbit_stages.h"
#include "vector.h"

namespace qk::cuda {
namespace {

// The bits of some numbers of a 16-bit type.
template <class X>
struct Bits16 {
  static constexpr bool kBrain = std::is_same_v<X, __nv_bfloat16>;
  static constexpr int kMantissa = kBrain ? 7 : 10, kBias = kBrain ? 127 : 15;
  static constexpr uint32_t kInfinity = kBrain ? 0x7F80 : 0x7C00;
  QK_HOST_DEVICE static constexpr uint32_t power(int exponent) {
    return static_cast<uint32_t>(kBias + exponent) << kMantissa;
  }
  QK_HOST_DEVICE static constexpr uint32_t twice(uint32_t bits) { return bits << 16 | bits; }
};

// Turns the codes of a word into numbers: code + constant.
//
// The bits of a code are put into the mantissa of 2^m, m being the number of mantissa bits. At place j that is the
// number 2^m + code * 2^j. Times 2^-j, plus (constant - 2^(m - j)), it is code + constant. All of this is exact:
//
//   2^m + code * 2^j     below 2^(m + 1), because the code ends within the mantissa
//   constant - 2^(m - j) a multiple of 1/2, and at most 2^(m - 1) + 16 for j >= 1. That is below 2^m, and those
//                        multiples have m + 1 bits, which is what the type holds.
//   code + constant      a multiple of 1/2 below 32; the fma rounds only once, to this
//
// At place 0 the second one would need another bit for grids whose constant is not an integer. So places begin at 1,
// and a shifted word serves as many codes as fit between there and the mantissa's end.
template <int Bits, class X>
struct Decoder16 {
  using T = Bits16<X>;
  static constexpr int kCodes = (T::kMantissa - 1) / Bits;  // of a shifted word
  uint32_t addend[kCodes];

  __device__ __forceinline__ explicit Decoder16(float constant) {
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      const float sum = constant - static_cast<float>(1 << (T::kMantissa - place(i)));
      const auto pair = round_pair(sum, sum, X());
      memcpy(&addend[i], &pair, sizeof pair);
    }
  }
  QK_HOST_DEVICE static constexpr int place(int i) { return 1 + i % kCodes * Bits; }

  // Codes I and I + 16 / Bits of a word.
  template <int I>
  __device__ __forceinline__ uint32_t get(uint32_t word) const {
    constexpr int kPlace = place(I);
    constexpr uint32_t kMask = T::twice(((1u << Bits) - 1) << kPlace), kBase = T::twice(T::power(T::kMantissa));
    const uint32_t number = and_or(shifted_left<kPlace - I * Bits>(word), kMask, kBase);
    return exact_fma<X>(number, T::twice(T::power(-kPlace)), addend[I % kCodes]);
  }
};

// Eight numbers of a token as four words; 0 beyond the last column.
__device__ __forceinline__ uint4 load_eight(const uint16_t* row, int64_t col, int64_t cols, bool aligned) {
  uint32_t words[4] = {};
  if (aligned) {
    if (col < cols) return __ldg(reinterpret_cast<const uint4*>(row + col));
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (col + j < cols) words[j / 2] |= static_cast<uint32_t>(__ldg(row + col + j)) << 16 * (j % 2);
  }
  uint4 out;
  out.x = words[0];
  out.y = words[1];
  out.z = words[2];
  out.w = words[3];
  return out;
}

// x in shared memory: operands of this block's columns, as [granule][pair of products][token][lane t].
//
// A vector has the registers b0, b1 of two products, which are columns i .. i + 3 of the lane's word and their partners
// H columns later.
template <int Bits, class X>
struct SharedTokens {
  static constexpr LowbitLayout kLayout{Bits};
  static constexpr int kRun = 32 / Bits;     // columns of a word
  static constexpr int kVectors = kRun / 8;  // of a word
  // What a thread moves at a time: eight neighbours with their partners. At 4 bits those are one load, else two.
  static constexpr int kLoads = Bits == 4 ? 1 : 2, kItemCols = 8 * kLoads;
  using T = Bits16<X>;

  uint4* x;
  float* units;  // [kMaxTokens]

  // Copies tokens. Sums of x are not defined where it is infinite: there, tokens with infinities are marked by a unit
  // of infinity.
  template <bool XSums>
  __device__ __forceinline__ void load(const LowbitGemv& p, const WarpShare& share) const {
    constexpr int kUnroll = 8 / kLoads, kItems = kRun / kItemCols;
    const auto rows = static_cast<const uint16_t*>(p.x_16);
    const bool aligned = p.cols % 8 == 0 && reinterpret_cast<uintptr_t>(rows) % 16 == 0;
    const int items = share.chunk_stages * (kLayout.stage_cols / kItemCols), all = items * p.tokens;
    const int64_t first_col = int64_t{share.chunk_first} * kLayout.stage_cols;
    for (int first = static_cast<int>(threadIdx.x); first < all; first += kUnroll * kGemvThreads) {
      uint4 in[kUnroll][kLoads];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int i = first + u * kGemvThreads, token = i / items, item = i % items;
        if (i >= all) break;
        const int64_t col = first_col + item / kItems * kRun + item % kItems * 8;
#pragma unroll
        for (int k = 0; k < kLoads; ++k)
          in[u][k] = load_eight(rows + token * p.cols, col + k * (kRun / 2), p.cols, aligned);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int i = first + u * kGemvThreads, token = i / items, item = i % items;
        if (i >= all) break;
        const int word = item / kItems, vector = word / 4 * kVectors + item % kItems * kLoads;
        store(in[u], x + (vector * p.tokens + token) * 4 + word % 4, 4 * p.tokens);
        if (XSums && any_infinite(in[u])) units[token] = INFINITY;
      }
    }
  }

  // Stores the vectors of an item, `stride` apart.
  __device__ __forceinline__ static void store(const uint4 (&in)[kLoads], uint4* to, int stride) {
    uint32_t low[2 * kLoads], high[2 * kLoads];
    low[0] = in[0].x;
    low[1] = in[0].y;
    if constexpr (kLoads == 1) {
      high[0] = in[0].z;
      high[1] = in[0].w;
    } else {
      low[2] = in[0].z;
      low[3] = in[0].w;
      high[0] = in[1].x;
      high[1] = in[1].y;
      high[2] = in[1].z;
      high[3] = in[1].w;
    }
#pragma unroll
    for (int v = 0; v < kLoads; ++v) {
      uint4 out;
      out.x = __byte_perm(low[2 * v], high[2 * v], 0x5410);
      out.y = __byte_perm(low[2 * v], high[2 * v], 0x7632);
      out.z = __byte_perm(low[2 * v + 1], high[2 * v + 1], 0x5410);
      out.w = __byte_perm(low[2 * v + 1], high[2 * v + 1], 0x7632);
      to[v * stride] = out;
    }
  }

  __device__ __forceinline__ static bool any_infinite(const uint4 (&in)[kLoads]) {
    const auto infinite = [](uint32_t word) {
      return (word & 0x7FFF) == T::kInfinity || (word & 0x7FFF0000) == T::kInfinity << 16;
    };
    bool any = false;
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      any |= infinite(in[k].x) || infinite(in[k].y) || infinite(in[k].z) || infinite(in[k].w);
    return any;
  }

  // Of marked tokens, infinities become plus or minus 1, NaN stays, and other numbers become 0: their sums, times the
  // unit, have the sign of the infinity that the product is.
  __device__ __forceinline__ void replace_infinities(const LowbitGemv& p, const WarpShare& share) const {
    bool any = false;
    for (int token = 0; token < p.tokens; ++token) any |= units[token] != 1;
    if (!any) return;
    const auto replaced = [](uint32_t half) {
      const uint32_t magnitude = half & 0x7FFF;
      return magnitude == T::kInfinity ? (half & 0x8000) | T::power(0) : magnitude > T::kInfinity ? half : 0;
    };
    const int words = share.chunk_stages * (kLayout.stage_cols / 2) * p.tokens;
    uint32_t* const at = reinterpret_cast<uint32_t*>(x);
    for (int i = static_cast<int>(threadIdx.x); i < words; i += kGemvThreads)
      if (units[i / 16 % p.tokens] != 1) at[i] = replaced(at[i] & 0xFFFF) | replaced(at[i] >> 16) << 16;
    __syncthreads();
  }
};

// The sums of a warp for sixteen rows and eight tokens, spread over lanes as ptx.h says. Products with codes, in two
// chains because they wait for each other, and sums of x; both of the last eight products or fewer, and of the current
// group. The total over groups.
struct Sums16 {
  float products[2][4], x_sums[4], group[4], group_x[2], total[4];

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < 4; ++i) products[0][i] = products[1][i] = x_sums[i] = group[i] = group_x[i % 2] = total[i] = 0;
  }
  // Adds the last products to the group.
  __device__ __forceinline__ void fold() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      group[i] += products[0][i] + products[1][i];
      products[0][i] = products[1][i] = 0;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) group_x[i] += x_sums[i];
#pragma unroll
    for (int i = 0; i < 4; ++i) x_sums[i] = 0;
  }
  __device__ __forceinline__ void end_group(const LowbitGemv::Affine& upper, const LowbitGemv::Affine& lower) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const LowbitGemv::Affine& affine = i < 2 ? upper : lower;
      total[i] = fmaf(affine.step, fmaf(affine.shift, group_x[i % 2], group[i]), total[i]);
      group[i] = 0;
    }
    group_x[0] = group_x[1] = 0;
  }
};

// The scales of the current group of a lane's two rows. They are loaded when the group begins, and used when it ends.
struct GroupScales {
  LowbitGemv::RawScale upper, lower;

  __device__ __forceinline__ void load(const LowbitGemv& p, const int64_t (&rows)[2], int group) {
    upper = p.load_raw(rows[0], group);
    lower = p.load_raw(rows[1], group);
  }
};

// Where a lane finds its operands of x: those of token g, or zeros if there is no such token.
struct TokenOperands {
  const uint4* first;
  int stride;

  __device__ __forceinline__ const uint4& operator[](int i) const { return first[i * stride]; }
};

// The products of granule i of a stage. Its operands of x begin at `at`.
template <int Bits, class X, bool XSums>
__device__ __forceinline__ void multiply_granule(const Decoder16<Bits, X>& decoder, const uint32_t* words, int i,
                                                 const TokenOperands& x, int at, Sums16& sums) {
  constexpr LowbitLayout kLayout(Bits);
  constexpr int kVectors = SharedTokens<Bits, X>::kVectors;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const uint32_t upper = words[g * (kLayout.pitch / 4) + kLayout.word(i, t, 0)];
  const uint32_t lower = words[(g + 8) * (kLayout.pitch / 4) + kLayout.word(i, t, 0)];
  const auto multiply = [&](auto index) {
    constexpr int kFirst = 4 * decltype(index)::value;
    const uint4 b = x[at + decltype(index)::value];
    multiply_add<X>(sums.products[0], decoder.template get<kFirst>(upper), decoder.template get<kFirst>(lower),
                    decoder.template get<kFirst + 1>(upper), decoder.template get<kFirst + 1>(lower), b.x, b.y);
    multiply_add<X>(sums.products[1], decoder.template get<kFirst + 2>(upper), decoder.template get<kFirst + 2>(lower),
                    decoder.template get<kFirst + 3>(upper), decoder.template get<kFirst + 3>(lower), b.z, b.w);
    if constexpr (XSums) {
      constexpr uint32_t kOnes = Bits16<X>::twice(Bits16<X>::power(0));
      multiply_add<X>(sums.x_sums, kOnes, kOnes, kOnes, kOnes, b.x, b.y);
      multiply_add<X>(sums.x_sums, kOnes, kOnes, kOnes, kOnes, b.z, b.w);
    }
  };
  each(multiply, std::make_integer_sequence<int, kVectors>());
}

// Multiplies a stage, and adds groups that end in it to the total.
template <int Bits, class X, bool XSums>
__device__ __forceinline__ void multiply_stage(const LowbitGemv& p, const WarpShare& share, int stage,
                                               const Decoder16<Bits, X>& decoder, const uint32_t* words,
                                               const TokenOperands& x, const int64_t (&rows)[2],
                                               GroupPosition& position, GroupScales& scales, Sums16& sums) {
  constexpr LowbitLayout kLayout(Bits);
  constexpr int kVectors = SharedTokens<Bits, X>::kVectors, kFold = kVectors >= 4 ? 1 : 4 / kVectors;
  const int at = (stage - share.chunk_first) * kLayout.granules * kVectors;
#pragma unroll
  for (int i = 0; i < kLayout.granules; ++i) {
    multiply_granule<Bits, X, XSums>(decoder, words, i, x, at + i * kVectors, sums);
    const bool ends = --position.left == 0 || (stage == share.end - 1 && i == kLayout.granules - 1);
    if (ends || (i + 1) % kFold == 0) sums.fold();
    if (!ends) continue;
    sums.end_group(p.affine(scales.upper), p.affine(scales.lower));
    position.left = p.group_granules;
    scales.load(p, rows, ++position.group);
  }
}

}  // namespace

// XSums: whether sums of x are needed.
template <int Bits, class X, bool XSums>
__global__ void __launch_bounds__(kGemvThreads, 1) lowbit_gemv16_kernel(const LowbitGemv p) {
  constexpr LowbitLayout kLayout(Bits);
  constexpr SharedPlan kShared(kLayout, 1);
  uint8_t* const shared = dynamic_shared();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int g = lane / 4, t = lane % 4;
  const WarpShare share(p, warp);
  StageRing<Bits> ring(p, share, shared + warp * kSlots * kShared.slot);
#pragma unroll 1
  for (int i = 0; i < kSlots - 1; ++i) ring.fetch(p, share, kShared.slot);

  // Weights are on their way.
  uint4* const zeros = reinterpret_cast<uint4*>(shared + kShared.zeros);
  const SharedTokens<Bits, X> tokens{reinterpret_cast<uint4*>(shared + kShared.x),
                                     reinterpret_cast<float*>(shared + kShared.units)};
  if (thread == 0) zeros->x = zeros->y = zeros->z = zeros->w = 0;
  if (thread < kMaxTokens) tokens.units[thread] = 1;
  __syncthreads();
  tokens.template load<XSums>(p, share);
  __syncthreads();
  if constexpr (XSums) tokens.replace_infinities(p, share);

  const bool mine = g < p.tokens;
  const TokenOperands x{mine ? tokens.x + g * 4 + t : zeros, mine ? 4 * p.tokens : 0};
  const Decoder16<Bits, X> decoder(p.constant);
  Sums16 sums;
  int slot = 0;
  for (int round = share.block; round < p.rounds; round += p.row_blocks) {
    const int64_t first_row = share.first_row(round);
    const int64_t rows[2] = {min(first_row + g, p.rows - 1), min(first_row + g + 8, p.rows - 1)};
    sums.start();
    GroupPosition position(p, share, kLayout.granules);
    GroupScales scales;
    scales.load(p, rows, position.group);
    for (int stage = share.first; stage < share.end; ++stage) {
      copy_wait<kSlots - 2>();
      __syncwarp();  // all copies of the stage have arrived, and all lanes have read the slot before this one
      ring.fetch(p, share, kShared.slot);
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(ring.slots + slot * kShared.slot);
      slot = slot + 1 == kSlots ? 0 : slot + 1;
      multiply_stage<Bits, X, XSums>(p, share, stage, decoder, words, x, rows, position, scales, sums);
    }
    const float totals[1][4] = {{sums.total[0], sums.total[1], sums.total[2], sums.total[3]}};
    write_round(p, totals, tokens.units, reinterpret_cast<float*>(shared + kShared.sums), share.chunk, round);
    __syncthreads();
  }
  copy_wait<0>();
}

namespace {

template <int Bits, class X, bool XSums>
cudaError_t start(const LowbitGemv& p, const LowbitGemvPlan& plan, cudaStream_t stream) {
  const auto kernel = lowbit_gemv16_kernel<Bits, X, XSums>;
  static PreparedKernel prepared;
  const cudaError_t error = prepared.prepare(kernel, plan.device);
  if (error != cudaSuccess) return error;
  // Not a dependent launch: the kernel before may have written the weights.
  return launch(kernel, int64_t{p.chunks} * p.row_blocks, kGemvThreads, SharedPlan(plan.layout, 1).x + plan.shared_x(p),
                stream, p);
}

template <int Bits>
cudaError_t start(const LowbitGemv& p, const LowbitGemvPlan& plan, cudaStream_t stream) {
  const bool brain = p.x_type == DType::bf16;
  if (p.sums)
    return brain ? start<Bits, __nv_bfloat16, true>(p, plan, stream) : start<Bits, __half, true>(p, plan, stream);
  return brain ? start<Bits, __nv_bfloat16, false>(p, plan, stream) : start<Bits, __half, false>(p, plan, stream);
}

}  // namespace

cudaError_t lowbit_gemv16(const LowbitGemv& p, const LowbitGemvPlan& plan, cudaStream_t stream) {
  switch (plan.layout.bits) {
    case 1:
      return start<1>(p, plan, stream);
    case 2:
      return start<2>(p, plan, stream);
    case 4:
      return start<4>(p, plan, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace qk::cuda
