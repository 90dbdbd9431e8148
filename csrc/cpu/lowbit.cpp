// Products with packed weights: choosing the path, preparing the activations, and what the paths share.
#include "lowbit.h"

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "kernels.h"

namespace qk {
namespace QK_ISA {
namespace {

constexpr int64_t kLines = 528;            // whose sums for a panel are kept at once, at most; a multiple of the digits
constexpr int64_t kManyBytes = 256 << 10;  // of activations, which the second cache level holds

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// What tables may take, for all tokens: they stream through the second cache level for every few rows.
constexpr int64_t kTableBytes = 4 << 20;

int64_t table_bytes(const LowbitLinearCall& call) {
  return (call.cols + chunk_codes(call.bits) - 1) / chunk_codes(call.bits) * 16 * kWordTables;
}

// Whether sums are looked up. Their error is measured by the lowest code's magnitude, which must be the largest one of
// the grid (ternary has no code 3). At 2 bits an entry serves two activations only, and products of bfloat16 are as
// fast.
[[maybe_unused]] bool has_tables(const LowbitLinearCall& call) {
  const double low = call.code_min + call.offset;
  return !call.act_bits && !call.zero_point && low < 0 && -2 * low >= (1 << call.bits) - 2 &&
         (call.bits == 1 || (call.bits == 2 && call.x_type != DType::bf16)) &&
         call.tokens * table_bytes(call) <= kTableBytes;
}

Path path_of(const LowbitLinearCall& call) {
  [[maybe_unused]] const bool whole_words = call.groups == 1 || call.cols / call.groups % word_codes(call.bits) == 0;
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
  if (whole_words) {
    if (has_tables(call)) return Path::kTables;
#if defined(__AVX512BF16__)
    if (!call.act_bits && call.x_type == DType::bf16) return Path::kPairs;
#endif
    return Path::kFours;
  }
#endif
  return Path::kFloat;
}

// A call of f with a pointer to numbers of the type in place of one to void.
template <class Void, class F>
void with_float(DType type, Void* p, F f) {
  const auto as = [p]<class T>(T) { return static_cast<std::conditional_t<std::is_const_v<Void>, const T, T>*>(p); };
  switch (type) {
    case DType::bf16:
      return f(as(bfloat16()));
    case DType::f16:
      return f(as(float16()));
    default:
      return f(as(float()));
  }
}

// Reads a row as float, in sixteens, the last of them filled up with zeros.
template <class T>
void widen_row(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store(to + i, load_first(from + i, n - i));
}

// Turns a token into whole numbers of up to `most` in place, and returns their scale. A token that holds NaN or an
// infinity gets zeros and the scale NaN.
float quantize_token(float* x, int64_t n, float most) {
  F32 largest(0.0f), poison(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 v = load(x + i);
    largest = max_of(max_of(v, F32(0.0f) - v), largest);
    poison = poison + (v - v);
  }
  float lanes[kLanes];
  store(lanes, largest);
  if (sum(poison) != 0) {
    std::fill(x, x + n, 0.0f);
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = std::max(*std::max_element(lanes, lanes + kLanes) / most, std::numeric_limits<float>::min());
  for (int64_t i = 0; i < n; i += kLanes)
    store(x + i, min_of(F32(most), max_of(F32(0.0f - most), load(x + i) / F32(scale))));
  for (int64_t i = 0; i < n; ++i) x[i] = std::nearbyint(x[i]);
  return scale;
}

// What a digit is worth.
constexpr float kPlaces[kDigits] = {1, 256, 65536};

// Takes the lowest digit off each number.
void take_digit(float* x, float* digit, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const auto v = static_cast<int32_t>(x[i]);
    const int32_t low = static_cast<int8_t>(v);
    digit[i] = static_cast<float>(low);
    x[i] = static_cast<float>((v - low) >> 8);
  }
}

}  // namespace

// Up to here taking the codes apart again for every four lines is faster than transposing them once, at 4096 x 4096.
constexpr int64_t kFewLines = 12;

Activations::Activations(const LowbitLinearCall& call, void* memory) : path(path_of(call)) {
  const int64_t chunk = path == Path::kFloat ? kLanes : chunk_codes(call.bits);
  padded = (call.cols + chunk - 1) / chunk * chunk;
  digits = path == Path::kFours && !call.act_bits ? kDigits : 1;
  constexpr int64_t column_bytes[] = {4, 2, 1};
  line_bytes = path == Path::kTables ? table_bytes(call) : padded * column_bytes[static_cast<int>(path)];
  const int64_t lines = call.tokens * digits, size = call.cols / call.groups;
  // Groups must divide chunks or the other way round, and sums of int8 products stay below 2^31.
  by_chunk =
      lines <= kFewLines && size > 0 && size <= 32768 && (call.groups == 1 || size % chunk == 0 || chunk % size == 0);
  char* at = static_cast<char*>(memory);
  const auto take = [&at](int64_t n) {
    char* const p = at;
    at += aligned(n);
    return p;
  };
  const bool with_sums = path == Path::kFours || (path == Path::kPairs && call.zero_point);
  const bool with_scales = path == Path::kFours || call.act_bits;
  x = take(lines * stride());
  sums = with_sums ? reinterpret_cast<float*>(take(lines * call.groups * 4)) : nullptr;
  scales = with_scales ? reinterpret_cast<float*>(take(call.tokens * 4)) : nullptr;
  units = path == Path::kTables ? reinterpret_cast<float*>(take(lines * call.groups * 4)) : nullptr;
  bytes = at - static_cast<char*>(memory);
}

int64_t lowbit_memory(const LowbitLinearCall& call) { return Activations(call, nullptr).bytes; }

void lowbit_prepare(const LowbitLinearCall& call, void* memory, int64_t begin, int64_t end) {
  const Activations a(call, memory);
  const int64_t size = call.cols / call.groups;
  std::vector<float> numbers(a.padded + kLanes), digit(a.digits > 1 ? a.padded : 0);
  const auto add_up = [&](const float* x, int64_t line) {
    if (!a.sums) return;
    for (int64_t g = 0; g < call.groups; ++g) {
      const float* const from = x + g * size;
      F32 lanes(0.0f);
      int64_t i = 0;
      for (; i + kLanes <= size; i += kLanes) lanes = lanes + load(from + i);
      a.sums[line * call.groups + g] = sum(i < size ? lanes + load_first(from + i, size - i) : lanes);
    }
  };
  for (int64_t t = begin; t < end; ++t) {
    float* const x = numbers.data();
    char* const to = const_cast<char*>(a.line(t * a.digits));
    with_float(call.x_type, call.x, [&](auto* from) { widen_row(from + t * call.cols, call.cols, x); });
    std::fill(x + call.cols, x + a.padded, 0.0f);
    if (a.scales)
      a.scales[t] =
          quantize_token(x, a.padded, a.digits > 1 ? kLargest : static_cast<float>((1 << (call.act_bits - 1)) - 1));
    switch (a.path) {
      case Path::kFloat:
        std::memcpy(to, x, a.padded * 4);
        break;
      case Path::kPairs:
        add_up(x, t);
        write_pairs(x, a, call.bits, to);
        break;
      case Path::kTables:
        write_tables(call, x, a, to, a.units + t * call.groups);
        break;
      case Path::kFours:
        for (int64_t d = 0; d < a.digits; ++d) {
          const float* line = x;
          if (a.digits > 1) {
            take_digit(x, digit.data(), a.padded);
            line = digit.data();
          }
          add_up(line, t * a.digits + d);
          write_fours(line, a, call.bits, to + d * a.stride());
        }
    }
  }
}

namespace {

// Digits, scales of tokens, bias, and the dtype of the output.
template <class Y>
void finish(const RowBlock& b, const float* sums, Y* y) {
  const LowbitLinearCall& call = b.call;
  const Activations& a = b.activations;
  float bias[kPanel] = {};
  if (call.bias)
    for (int64_t r = 0; r < b.rows; ++r) bias[r] = read_float(call.bias, call.bias_type, b.first_feature + r);
  for (int64_t line = 0; line < b.lines; line += a.digits) {
    const int64_t token = (b.first_line + line) / a.digits;
    Y row[kPanel];
    for (int64_t r = 0; r < kPanel; r += kLanes) {
      F32 v = load(sums + line * kPanel + r);
      for (int64_t d = 1; d < a.digits; ++d) v = multiply_add(load(sums + (line + d) * kPanel + r), F32(kPlaces[d]), v);
      if (a.scales) v = v * F32(a.scales[token]);
      if (call.bias) v = v + load(bias + r);
      store(row + r, v);
    }
    std::memcpy(y + token * call.rows + b.first_feature, row, b.rows * sizeof(Y));
  }
}

}  // namespace

void lowbit_multiply(const LowbitLinearCall& call, void* memory, const Expert* experts, int64_t begin, int64_t end) {
  const Activations activations(call, memory);
  constexpr decltype(&multiply_fours) paths[] = {multiply_float, multiply_pairs, multiply_fours, multiply_tables};
  const auto multiply = paths[static_cast<int>(activations.path)];
  const int64_t panels = (call.rows + kPanel - 1) / kPanel;
  const bool is_float = activations.path == Path::kFloat;
  const int64_t most_lines = is_float ? kFloatLines : kLines;
  const int64_t lines = std::min(most_lines, call.tokens * activations.digits);
  // Panels at once. Few lines stay in the cache for one after the other, and each row is then read to its end.
  const int64_t many = is_float && lines * activations.line_bytes > kManyBytes ? kFloatPanels : 1;
  const int64_t most = activations.path == Path::kTables ? kTablePanels : many;
  const std::unique_ptr<float[]> sums(new float[most * lines * kPanel + 16]);  // filled by multiply
  const std::unique_ptr<char[]> scratch(new char[is_float ? 0 : scratch_bytes(call) + 64]);
  float* const at = reinterpret_cast<float*>(aligned(reinterpret_cast<int64_t>(sums.get())));
  void* const aside = reinterpret_cast<void*>(aligned(reinterpret_cast<int64_t>(scratch.get())));
  for (int64_t unit = begin, taken; unit < end; unit += taken) {
    const Expert& expert = experts[unit / panels];
    taken = std::min({most, end - unit, panels - unit % panels});
    const int64_t feature = unit % panels * kPanel, rows = std::min(taken * kPanel, call.rows - feature);
    const int64_t last = expert.last * activations.digits;
    const int64_t tokens = expert.last - expert.first,
                  times = (tokens * activations.digits + most_lines - 1) / most_lines;
    const int64_t step = (tokens + times - 1) / times * activations.digits;
    for (int64_t line = expert.first * activations.digits; line < last; line += step) {
      RowBlock block{call, activations, line, std::min(step, last - line), expert.index * call.rows + feature,
                     rows, feature};
      multiply(block, at, aside);
      for (const float* from = at; block.first_feature < feature + rows; from += block.lines * kPanel) {
        block.rows = std::min(kPanel, feature + rows - block.first_feature);
        with_float(call.x_type, call.y, [&](auto* y) { finish(block, from, y); });
        block.first_feature += kPanel;
      }
    }
  }
}

}  // namespace QK_ISA
}  // namespace qk
