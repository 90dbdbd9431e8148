// Products with packed weights by tiles (tiles.h), for machines with AMX, from a few activation rows on.
//
// Weight rows are the left factor: decoding the codes of a row writes a row of tiles, and nothing is transposed.
// Activations are the right factor, so they are rearranged once for all weight rows:
//
//     columns of a step | tile of sixteen tokens, and limb | operand | token: 4 bytes
//
// A step is the columns that are decoded at once. They stay in the first cache level while all tokens of a block are
// multiplied with them. Of the activations, a step of a block's tokens stays in the second level, while several panels
// are multiplied with it.
//
// The sums of a tile are a row of the weight times sixteen tokens. Without groups they stay sums of operands, integers
// for int8, until all columns are added. With groups, each group's sums leave the tiles and are scaled.
#include <algorithm>

#include "lowbit_finish.h"
#include "lowbit_operands.h"
#include "tiles.h"

namespace qk {
namespace QK_ISA {

#if defined(QK_LOWBIT_VNNI)
namespace {

constexpr int64_t kStepBytes = 512;    // of a weight row: 16 KiB of a panel
constexpr int64_t kBlockTokens = 512;  // at most, limbs counted
// Panels of a block: many where not all activations stay in the second cache level. Few otherwise: then the next
// columns of a weight row are read soon after the last ones, which prefetchers follow.
constexpr int64_t kBlockPanels = 16, kFewPanels = 2, kCacheBytes = 768 << 10;
// The fewest activation rows for which tiles are faster than products in registers, or than lookups (1 bit): a trial on
// two cores of a Xeon with AMX, 4096 x 4096.
constexpr int64_t kFewestBf16 = 4, kFewestInt8 = 8, kFewestOneBit = 12;
constexpr int64_t kLargestIntSum = 131071;  // products of two int8 that a sum of 32 bits holds

template <class Products>
constexpr int64_t kElementBytes = sizeof(typename Products::Element);
template <class Products>
constexpr int64_t kStepCols = kStepBytes / kElementBytes<Products>;

// ---- Codes to operands ----

// 64 codes, packed in the first bytes of a register, to operands of tiles in the order of columns.
template <int Bits, class Products>
class TileDecoder;

// The value of a code, less its zero point, is (per_code * code + low) / per_code + shift. Values of most grids are
// integers, or halves of odd ones; so operands are signed integers, shift is zero, and sums of x are not needed.
struct IntegerCodes {
  int per_code, low;
  float shift;

  explicit IntegerCodes(const LowbitLinearCall& call) {
    const double lowest = call.code_min + call.offset, highest = lowest + (1 << call.bits) - 1;
    for (per_code = 1; per_code <= 2; ++per_code) {
      low = static_cast<int>(per_code * lowest);
      shift = 0;
      if (low == per_code * lowest && low >= -128 && per_code * highest <= 127) return;
    }
    per_code = 1;
    low = -(1 << (call.bits - 1));
    shift = static_cast<float>(lowest - low);
  }
};

template <int Bits>
class TileDecoder<Bits, Int8Products> {
 public:
  explicit TileDecoder(const LowbitLinearCall& call) : codes_(call) {
    low_ = _mm512_set1_epi8(static_cast<char>(codes_.low));
    twice_ = _mm512_set1_epi8(codes_.per_code == 2 ? -1 : 0);
  }
  float per_code() const { return static_cast<float>(codes_.per_code); }
  float code_shift() const { return codes_.shift; }
  QK_INLINE void write(__m512i bytes, char* to) const {
    const __m512i codes = expand<Bits>(bytes);
    _mm512_store_si512(to, _mm512_add_epi8(_mm512_add_epi8(codes, _mm512_and_si512(codes, twice_)), low_));
  }

 private:
  IntegerCodes codes_;
  __m512i low_, twice_;
};

template <int Bits>
class TileDecoder<Bits, Bf16Products> {
 public:
  explicit TileDecoder(const LowbitLinearCall& call)
      : low_(_mm512_set1_ps(static_cast<float>(call.code_min + call.offset))) {
    alignas(64) uint16_t table[32];
    for (int i = 0; i < 32; ++i) {
      const float level = static_cast<float>(i % (1 << std::min(Bits, 5)) + call.code_min + call.offset);
      uint32_t bits;
      std::memcpy(&bits, &level, 4);
      table[i] = static_cast<uint16_t>(bits >> 16);  // at most eight significant bits: exact
    }
    levels_ = _mm512_load_si512(table);
  }
  float per_code() const { return 1; }
  float code_shift() const { return 0; }

  QK_INLINE void write(__m512i bytes, char* to) const {
#if defined(__AVX512VBMI__)
    if constexpr (Bits <= 5) {
      // Each 16-bit element gets the two bytes that hold its code, shifts it down, and looks up its lowest five bits.
      alignas(64) static constexpr auto tables = [] {
        struct {
          uint8_t bytes[2][64];
          uint16_t shift[2][32];
        } t{};
        for (int i = 0; i < 64; ++i) {
          t.bytes[i / 32][i % 32 * 2] = static_cast<uint8_t>(i * Bits / 8);
          t.bytes[i / 32][i % 32 * 2 + 1] = static_cast<uint8_t>(i * Bits / 8 + 1);
          t.shift[i / 32][i % 32] = static_cast<uint16_t>(i * Bits % 8);
        }
        return t;
      }();
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512i found = _mm512_permutexvar_epi8(_mm512_load_si512(tables.bytes[half]), bytes);
        const __m512i codes = _mm512_srlv_epi16(found, _mm512_load_si512(tables.shift[half]));
        _mm512_store_si512(to + half * kTileBytes, _mm512_permutexvar_epi16(codes, levels_));
      }
      return;
    }
#endif
    const __m512i codes = expand<Bits>(bytes);
    const auto store = [&](int half, __m256i of_half) QK_INLINE_LAMBDA {
      _mm512_store_si512(to + half * kTileBytes, values(_mm512_cvtepu8_epi16(of_half)));
    };
    store(0, _mm512_castsi512_si256(codes));
    store(1, _mm512_extracti64x4_epi64(codes, 1));
  }

 private:
  QK_INLINE __m512i values(__m512i codes) const {
    if constexpr (Bits <= 5) return _mm512_permutexvar_epi16(codes, levels_);
    const auto to_float = [&](__m512i v) QK_INLINE_LAMBDA { return _mm512_add_ps(_mm512_cvtepi32_ps(v), low_); };
    const __m512 even = to_float(_mm512_and_si512(codes, _mm512_set1_epi32(0xFFFF)));
    const __m512 odd = to_float(_mm512_srli_epi32(codes, 16));
    return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(_mm512_castps_si512(even), 16),
                                   _mm512_castps_si512(odd));
  }

  __m512i levels_;
  __m512 low_;
};

// The packed bytes of some columns of a panel.
template <int Bits>
struct PackedPanel {
  const uint8_t* first;
  int64_t stride, rows, bytes, cols;  // bytes: of a row

  PackedPanel(const LowbitBlock& b, int64_t panel, int64_t first_col, int64_t cols_)
      : stride(row_bytes(b.plan.call.cols, Bits)),
        rows(std::min(kPanel, b.rows - panel * kPanel)),
        bytes(std::min(cols_ / 8 * Bits, stride - first_col / 8 * Bits)),
        cols(cols_) {
    first = b.plan.call.packed + (b.first_row + panel * kPanel) * stride + first_col / 8 * Bits;
  }
  // A part of the rows: all of them at once would exceed the outstanding loads of a core.
  void prefetch(int64_t part, int64_t parts) const {
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row)
      for (int64_t i = 0; i < bytes; i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(first + row * stride + i), _MM_HINT_T1);
  }
  // Writes [2 halves, steps of tiles] tiles. Rows that the panel lacks become those of its last.
  template <class Products>
  __attribute__((noinline)) void decode(const TileDecoder<Bits, Products>& decoder, char* to) const {
    constexpr int64_t step = kElementBytes<Products> * kTileBytes;  // of 64 columns
    const int64_t half_bytes = cols / 64 * step;
    for (int64_t r = 0; r < kPanel; ++r) {
      const uint8_t* const from = first + std::min(r, rows - 1) * stride;
      char* out = to + r / 16 * half_bytes + r % 16 * 64;
      int64_t i = 0;
      for (; i + 8 * Bits <= bytes; i += 8 * Bits, out += step)
        decoder.write(_mm512_maskz_loadu_epi8(mask_bytes(8 * Bits), from + i), out);
      if (i < bytes) decoder.write(_mm512_maskz_loadu_epi8(mask_bytes(bytes - i), from + i), out);
    }
  }
};

// ---- Products ----

// Whether sums stay in tiles for all columns.
template <class Products>
bool is_whole(const LowbitLinearCall& call) {
  return call.groups == 1 && (std::is_same_v<Products, Bf16Products> || call.cols <= kLargestIntSum);
}

// What turns the sums of a group's operands into values: scale * (sum + shift * sum of x), for sixteen rows.
template <class Sum>
struct RowFactors {
  const float *scale, *shift;  // [16]; shift may be null

  // total plus the values of a row of a tile of sums.
  QK_INLINE __m512 add(const char* tile, int row, __m512 x_sums, __m512 total) const {
    __m512 v;
    if constexpr (std::is_same_v<Sum, int32_t>)
      v = _mm512_cvtepi32_ps(_mm512_load_si512(tile + 64 * row));
    else
      v = _mm512_load_ps(tile + 64 * row);
    if (shift) v = _mm512_fmadd_ps(_mm512_set1_ps(shift[row]), x_sums, v);
    return _mm512_fmadd_ps(_mm512_set1_ps(scale[row]), v, total);
  }
};

// A block, and where its parts are.
template <class Products, class Tiles>
struct TileProduct {
  using Sum = typename Products::Sum;

  const LowbitBlock& b;
  char *sums, *decoded;
  float *scale, *shift;                                  // [panels, 2 halves, groups, 16]
  int64_t first_tile, tiles, right_tiles, padded_tiles;  // of sixteen tokens; times limbs; of all tokens, times limbs
  int64_t groups, group_operands;
  bool whole;  // sums stay in tiles for all columns
  Tiles multiplier;

  TileProduct(const LowbitBlock& block, float* sums_, char* scratch)
      : b(block),
        sums(reinterpret_cast<char*>(sums_)),
        decoded(scratch),
        groups(block.plan.call.groups),
        multiplier(block.plan.tile_operands) {
    const LowbitPlan& plan = b.plan;
    const int64_t first = b.first_act_row / plan.limbs, last = first + b.act_rows / plan.limbs;
    first_tile = first / kTileRows;
    tiles = (last + kTileRows - 1) / kTileRows - first_tile;
    right_tiles = tiles * plan.limbs;
    padded_tiles = round_up(plan.call.tokens, kTileRows) / kTileRows * plan.limbs;
    whole = is_whole<Products>(plan.call);
    group_operands = groups == 1 ? plan.padded_cols : plan.call.cols / groups;
    group_operands = group_operands * kElementBytes<Products> / 4;
    scale = reinterpret_cast<float*>(scratch + kPanel * kStepBytes);
    shift = b.x.sums ? scale + plan.block_panels * kPanel * groups : nullptr;
  }

  // The sums of x in a group, of the tokens of a right tile.
  QK_INLINE __m512 x_sums(int64_t right, int64_t group) const {
    return b.x.sums ? _mm512_load_ps(b.x.sums + ((first_tile * b.plan.limbs + right) * groups + group) * 16)
                    : _mm512_setzero_ps();
  }
  // Sums of x belong to the first part of a group, if it is decoded in several.
  QK_INLINE RowFactors<Sum> factors(int64_t panel, int64_t half, int64_t group, bool begins) const {
    const int64_t at = ((panel * 2 + half) * groups + group) * 16;
    return {scale + at, shift && begins ? shift + at : nullptr};
  }
  // The sums of a half panel and a right tile, [16 rows, 16 tokens].
  char* sums_of(int64_t panel, int64_t half, int64_t right) const {
    return sums + ((panel * 2 + half) * right_tiles + right) * kTileBytes;
  }

  template <int Bits>
  void multiply() {
    const LowbitPlan& plan = b.plan;
    const TileDecoder<Bits, Products> decoder(plan.call);
    const int64_t panels = (b.rows + kPanel - 1) / kPanel;
    for (int64_t half = 0; half < 2 * panels; ++half)
      transpose_scales(b, b.first_row + 16 * half, scale + 16 * groups * half,
                       shift ? shift + 16 * groups * half : nullptr, decoder.code_shift(), decoder.per_code());
    for (int64_t first = 0; first < plan.padded_cols; first += kStepCols<Products>) {
      const int64_t cols = std::min(kStepCols<Products>, plan.padded_cols - first);
      const int64_t operands = cols * kElementBytes<Products> / 4;
      const char* const x =
          b.x.operands + padded_tiles * first * kElementBytes<Products> * 16 + first_tile * plan.limbs * operands * 64;
      for (int64_t panel = 0; panel < panels; ++panel) {
        PackedPanel<Bits>(b, panel, first, cols).decode(decoder, decoded);
        const bool last = panel + 1 == panels;
        const int64_t next = last ? std::min(first + cols, plan.padded_cols - 64) : first;
        const PackedPanel<Bits> coming(b, last ? 0 : panel + 1, next, std::min(cols, plan.padded_cols - next));
        for (int64_t right = 0; right < right_tiles; right += 2) {
          coming.prefetch(right / 2, (right_tiles + 1) / 2);
          right + 1 < right_tiles ? add<2>(panel, right, first, operands, x) : add<1>(panel, right, first, operands, x);
        }
      }
    }
    // Token by token, whose features of several panels are next to each other.
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t panel = 0; panel < panels; ++panel) finish(panel, tile);
  }

  // The groups of operands, one after another.
  struct Group {
    int64_t group, left, whole;  // operands left, and of a whole group
    bool begins, first;          // whether none of it, and of any group, was added before

    Group(const TileProduct& product, int64_t first_col) : whole(product.group_operands), first(first_col == 0) {
      const int64_t operand = first_col * kElementBytes<Products> / 4;
      group = operand / whole;
      left = whole - operand % whole;
      begins = left == whole;
    }
    void next() {
      ++group;
      left = whole;
      begins = true;
      first = false;
    }
  };
  // Where the tile of operand i of decoded columns is. Half tiles lie in whole ones: their rows are the first or the
  // last 32 bytes of rows of 64.
  static int64_t left_at(int64_t i) { return i / kTileOperands * kTileBytes + 4 * (i % kTileOperands); }

  // Adds the products of decoded columns and one or two right tiles.
  template <int Right>
  QK_INLINE void add(int64_t panel, int64_t right, int64_t first_col, int64_t operands, const char* x) {
    const int64_t left_bytes = operands * 64, step = b.plan.tile_operands;
    x += right * left_bytes;
    const SumsAt at{sums_of(panel, 0, right), right_tiles * kTileBytes, kTileBytes};
    if (whole) {
      first_col ? multiplier.template load<Right>(at) : multiplier.template zero<Right>();
      for (int64_t i = 0; i < operands; i += kTileOperands)
        multiplier.template multiply<Right>({decoded + i * 64, left_bytes}, {x + i * 64, left_bytes});
      multiplier.template store<Right>(at);
      return;
    }
    alignas(64) char found[4 * kTileBytes];
    Group of(*this, first_col);
    for (int64_t i = 0; i < operands && of.group < groups; of.next()) {
      multiplier.template zero<Right>();
      for (const int64_t end = std::min(operands, i + of.left); i < end; i += step)
        multiplier.template multiply<Right>({decoded + left_at(i), left_bytes}, {x + i * 64, left_bytes});
      multiplier.template store<Right>({found, kTileBytes * 2, kTileBytes});
      for (int half = 0; half < 2; ++half)
        for (int r = 0; r < Right; ++r) {
          float* const to = reinterpret_cast<float*>(at.of(half, r));
          const __m512 of_x = x_sums(right + r, of.group);
          const RowFactors<Sum> of_rows = factors(panel, half, of.group, of.begins);
#pragma GCC unroll 16
          for (int row = 0; row < 16; ++row) {
            const __m512 sum = of.first ? _mm512_setzero_ps() : _mm512_load_ps(to + 16 * row);
            _mm512_store_ps(to + 16 * row, of_rows.add(found + (half * 2 + r) * kTileBytes, row, of_x, sum));
          }
        }
    }
  }

  // Weighs limbs, multiplies with the scales of tokens, adds the bias, and writes y in its dtype.
  void finish(int64_t panel, int64_t tile) const {
    const LowbitPlan& plan = b.plan;
    const LowbitLinearCall& call = plan.call;
    const int64_t rows = std::min(kPanel, b.rows - panel * kPanel), feature = b.first_feature + panel * kPanel;
    const int64_t first_token = b.first_act_row / plan.limbs, last_token = first_token + b.act_rows / plan.limbs;
    float bias[kPanel] = {};
    if (call.bias)
      for (int64_t r = 0; r < rows; ++r) bias[r] = read_float(call.bias, call.bias_type, feature + r);
    const int64_t begin = (first_tile + tile) * kTileRows;
    const __m512 token_scale = b.x.scales ? _mm512_loadu_ps(b.x.scales + begin) : _mm512_set1_ps(1);
    __m512i out[2][16];
    for (int half = 0; half < 2; ++half) {
      const RowFactors<Sum> of_rows = factors(panel, half, 0, true);
      for (int row = 0; row < 16; ++row) {
        __m512 total = _mm512_setzero_ps();
        for (int64_t limb = 0; limb < plan.limbs; ++limb) {
          const int64_t right = tile * plan.limbs + limb;
          const char* const from = sums_of(panel, half, right);
          const __m512 v = whole ? of_rows.add(from, row, x_sums(right, 0), _mm512_setzero_ps())
                                 : _mm512_load_ps(reinterpret_cast<const float*>(from) + 16 * row);
          total = limb ? _mm512_fmadd_ps(v, _mm512_set1_ps(kLimbWeights[limb]), total) : v;
        }
        total = _mm512_mul_ps(total, token_scale);
        if (call.bias) total = _mm512_add_ps(total, _mm512_set1_ps(bias[16 * half + row]));
        out[half][row] = _mm512_castps_si512(total);
      }
      transpose(out[half]);
    }
    with_float(call.x_type, call.y, [&](auto* y) {
      using Y = std::remove_pointer_t<decltype(y)>;
      for (int64_t token = std::max(begin, first_token); token < std::min(begin + kTileRows, last_token); ++token) {
        Y features[kPanel];
        for (int half = 0; half < 2; ++half) {
          F32 v;
          v.part[0] = (F32::Reg)out[half][token - begin];
          store(features + 16 * half, v);
        }
        std::memcpy(y + token * call.rows + feature, features, static_cast<size_t>(rows) * sizeof(Y));
      }
    });
  }
};

// ---- The kernels ----

template <class Products>
void multiply(const LowbitBlock& b, float* sums, void* scratch) {
  with_bits(b.plan.call.bits, [&](auto bits) {
    const auto with = [&]<class Tiles>(std::type_identity<Tiles>) {
      TileProduct<Products, Tiles>(b, sums, static_cast<char*>(scratch)).template multiply<bits>();
    };
#if defined(QK_WITH_AMX)
    if (b.plan.tiles == cpu::Tiles::amx) return with(std::type_identity<AmxTiles<Products>>());
#endif
    with(std::type_identity<PortableTiles<Products>>());
  });
}

// Operands of a tile along the columns: 16, or 8 if that is what divides a group; 0 if neither does.
template <class Products>
int64_t operands_of_tile(const LowbitLinearCall& call) {
  if (call.groups == 1) return kTileOperands;
  const int64_t cols = call.cols / call.groups, half = kTileOperands / 2 * 4 / kElementBytes<Products>;
  return cols == 0 || cols % half ? 0 : cols % (2 * half) ? kTileOperands / 2 : kTileOperands;
}

template <class Products>
bool serves_rows(const LowbitLinearCall& call, int64_t act_rows, int64_t fewest) {
  return cpu::tiles() != cpu::Tiles::none && call.cols > 0 && operands_of_tile<Products>(call) &&
         act_rows >= (call.bits == 1 && !call.act_bits ? kFewestOneBit : fewest);
}

template <class Products>
void plan_tiles(LowbitPlan& plan) {
  const LowbitLinearCall& call = plan.call;
  plan.tiles = cpu::tiles();
  plan.tile_operands = operands_of_tile<Products>(call);
  plan.token_step = kTileRows;
  plan.padded_cols = round_up(call.cols, 64);
  plan.operand_bytes = plan.padded_cols * kElementBytes<Products>;
  plan.block_act_rows =
      std::min(round_up(kBlockTokens / plan.limbs, kTileRows), round_up(call.tokens, kTileRows)) * plan.limbs;
  plan.block_panels = plan.block_act_rows * plan.operand_bytes > kCacheBytes ? kBlockPanels : kFewPanels;
  plan.sum_rows = plan.block_act_rows + kTileRows * plan.limbs;  // an expert's tokens may begin within a tile
  // Decoded columns, scales and shifts.
  plan.scratch_bytes = kPanel * kStepBytes + 2 * plan.block_panels * kPanel * call.groups * 4;
  // A limb, and the rows of a tile.
  plan.spare_bytes = plan.padded_cols * 4 + kTileRows * plan.limbs * plan.stride();
}

// Writes the operands of an activation row, in the order of columns.
template <class Products>
void write_row(const float* x, int64_t cols, char* to) {
  using Writer = OperandWriter<typename Products::Element>;
  for (int64_t i = 0; i < cols; i += Writer::kStep, to += 64) _mm512_storeu_si512(to, Writer::elements(x + i));
}

template <class Products>
void prepare(const LowbitPlan& plan, const LowbitActivations& to, int64_t token, float* x, float* spare) {
  const LowbitLinearCall& call = plan.call;
  char* const rows = reinterpret_cast<char*>(spare + plan.padded_cols);
  const int64_t in_tile = token % kTileRows, tile = token / kTileRows, stride = plan.stride();
  for (int64_t limb = 0; limb < plan.limbs; ++limb) {
    if (plan.limbs > 1) take_limb(x, spare, plan.padded_cols);
    const float* const from = plan.limbs > 1 ? spare : x;
    if (to.sums) {
      float* const of_tile = to.sums + (tile * plan.limbs + limb) * call.groups * 16 + in_tile;
      sum_groups(call, from, of_tile, 16);
    }
    write_row<Products>(from, plan.padded_cols, rows + (limb * kTileRows + in_tile) * stride);
  }
  if (in_tile + 1 < kTileRows && token + 1 < call.tokens) return;
  const int64_t padded_tiles = round_up(call.tokens, kTileRows) / kTileRows * plan.limbs;
  for (int64_t limb = 0; limb < plan.limbs; ++limb)
    for (int64_t first = 0; first < plan.operand_bytes; first += kStepBytes) {
      const int64_t bytes = std::min(kStepBytes, plan.operand_bytes - first);
      char* out = to.operands + padded_tiles * first * 16 + (tile * plan.limbs + limb) * bytes * 16;
      for (int64_t i = first; i < first + bytes; i += 64, out += kTileBytes) {
        __m512i t[16];
        for (int64_t r = 0; r < 16; ++r) t[r] = _mm512_loadu_si512(rows + (limb * kTileRows + r) * stride + i);
        transpose(t);
        for (int64_t r = 0; r < 16; ++r) _mm512_store_si512(out + 64 * r, t[r]);
      }
    }
}

bool serves_int8(const LowbitLinearCall& call) {
  if (!call.act_bits && call.x_type == DType::bf16) return false;  // limbs keep 24 bits below the largest
  return serves_rows<Int8Products>(call, call.tokens * (call.act_bits ? 1 : kLimbs), kFewestInt8);
}

void plan_int8(LowbitPlan& plan) {
  plan.limbs = plan.call.act_bits ? 1 : kLimbs;
  plan.has_sums = plan.call.zero_point || IntegerCodes(plan.call).shift != 0;
  plan_tiles<Int8Products>(plan);
}

bool serves_bf16(const LowbitLinearCall& call) {
  return !call.act_bits && call.x_type == DType::bf16 && serves_rows<Bf16Products>(call, call.tokens, kFewestBf16);
}

void plan_bf16(LowbitPlan& plan) {
  plan.has_sums = plan.call.zero_point != nullptr;
  plan_tiles<Bf16Products>(plan);
}

}  // namespace

const LowbitKernel int8_tiles_kernel{serves_int8, plan_int8, prepare<Int8Products>, multiply<Int8Products>};
const LowbitKernel bf16_tiles_kernel{serves_bf16, plan_bf16, prepare<Bf16Products>, multiply<Bf16Products>};
#endif

}  // namespace QK_ISA
}  // namespace qk
