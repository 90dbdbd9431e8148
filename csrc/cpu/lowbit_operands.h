// The operands of multiply-accumulate instructions: activations permuted to the order in which words give their codes,
// and words of codes decoded. lowbit_words.h has the picture.
#pragma once

#include "lowbit_words.h"

#if defined(QK_LOWBIT_VNNI)
namespace qk {
namespace QK_ISA {

// An operand is 32 bits: two bfloat16 or four int8. `T` is an unsigned integer of an element's size.
template <class T>
constexpr int64_t kOperandElements = 4 / sizeof(T);

// Permutes an activation row into the order in which Decoder::operand gives codes.
template <class T>
struct OperandWriter {
  static constexpr int64_t kElements = kOperandElements<T>, kStep = 64 / sizeof(T);

  // kStep values, exact in the type, as elements of a register.
  static QK_INLINE __m512i elements(const float* x) {
    const auto at = [x](int i) { return _mm512_loadu_ps(x + 16 * i); };
    if constexpr (kElements == 2) {
      const auto half = [&](int i) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(at(i)), 16)); };
      return _mm512_inserti64x4(_mm512_castsi256_si512(half(0)), half(1), 1);
    } else {
      const auto quarter = [&](int i) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(at(i))); };
      return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(quarter(1), quarter(0))),
                                _mm256_set_m128i(quarter(3), quarter(2)), 1);
    }
  }
  // Where element i comes from: element `operand + e * operands` of its word is element e of that operand.
  template <int Bits>
  static constexpr int64_t source(int64_t i) {
    constexpr int64_t word = word_codes(Bits), operands = word / kElements;
    return i / word * word + i % word / kElements + i % kElements * operands;
  }
#if !defined(__AVX512VBMI__)
  // The same in two steps, for bytes: pairs within lanes of sixteen bytes, then pairs between lanes. Both bytes of a
  // pair come from one lane.
  template <int Bits>
  static constexpr auto pairs_of_bytes() {
    struct {
      uint8_t within[64];
      uint16_t between[32];
    } t{};
    int found[4] = {};
    for (int i = 0; i < 32; ++i) {
      const auto first = source<Bits>(2 * i), second = source<Bits>(2 * i + 1), lane = first / 16;
      const auto pair = lane * 8 + found[lane]++;
      t.within[2 * pair] = static_cast<uint8_t>(first % 16);
      t.within[2 * pair + 1] = static_cast<uint8_t>(second % 16);
      t.between[i] = static_cast<uint16_t>(pair);
    }
    return t;
  }
#endif

  template <int Bits>
  static QK_INLINE __m512i permute(__m512i v) {
#if !defined(__AVX512VBMI__)
    if constexpr (kElements == 4) {
      alignas(64) static constexpr auto pairs = pairs_of_bytes<Bits>();
      return _mm512_permutexvar_epi16(_mm512_load_si512(pairs.between),
                                      _mm512_shuffle_epi8(v, _mm512_load_si512(pairs.within)));
    }
#endif
    alignas(64) static constexpr auto order = [] {
      struct {
        T at[kStep];
      } t{};
      for (int64_t i = 0; i < kStep; ++i) t.at[i] = static_cast<T>(source<Bits>(i));
      return t;
    }();
    const __m512i indices = _mm512_load_si512(order.at);
#if defined(__AVX512VBMI__)
    if constexpr (kElements == 4) return _mm512_permutexvar_epi8(indices, v);
#endif
    return _mm512_permutexvar_epi16(indices, v);
  }

  template <int Bits>
  static void write(const float* x, const LowbitPlan& plan, int32_t* to) {
    constexpr int64_t codes = chunk_codes(Bits), operands = word_codes(Bits) / kElements;
    alignas(64) int32_t words[16 * operands];
    for (int64_t c = 0; c < plan.padded_cols; c += codes, to += 16 * operands) {
      int32_t* const in_order = plan.chunk_major ? words : to;
      for (int64_t i = 0; i < codes; i += kStep)
        _mm512_store_si512(in_order + i / kElements, permute<Bits>(elements(x + c + i)));
      if (plan.chunk_major)
        for (int64_t j = 0; j < operands; ++j)
#pragma GCC unroll 16
          for (int64_t w = 0; w < 16; ++w) to[j * 16 + w] = words[w * operands + j];
    }
  }
};

template <class T>
void write_operands(const float* x, const LowbitPlan& plan, char* to) {
  with_bits(plan.call.bits,
            [&](auto bits) { OperandWriter<T>::template write<bits>(x, plan, reinterpret_cast<int32_t*>(to)); });
}

// The sums of an activation row's groups, `stride` floats apart, in an order that depends on the group size alone.
inline void sum_groups(const LowbitLinearCall& call, const float* x, float* sums, int64_t stride = 1) {
  const int64_t group_cols = call.cols / call.groups;
  for (int64_t g = 0; g < call.groups; ++g, x += group_cols) {
    F32 lanes(0.0f);
    int64_t i = 0;
    for (; i + kLanes <= group_cols; i += kLanes) lanes = lanes + load(x + i);
    sums[g * stride] = sum(i < group_cols ? lanes + load_first(x + i, group_cols - i) : lanes);
  }
}

// Removes the lowest limb from each integer.
inline void take_limb(float* x, float* limb, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const auto v = static_cast<int32_t>(x[i]);
    const int32_t low = static_cast<int8_t>(v);
    limb[i] = static_cast<float>(low);
    x[i] = static_cast<float>((v - low) >> 8);
  }
}

// Multiplication and accumulation of operands, and the conversion of a word of codes into operands.
#if defined(__AVX512BF16__)
struct Bf16Pairs {
  using Element = uint16_t;
  using Sum = __m512;
  static QK_INLINE Sum zero() { return _mm512_setzero_ps(); }
  static QK_INLINE Sum dot(Sum acc, __m512i w, __m512i x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
  // In assembly, because around the intrinsic compilers add register copies when there are many sums.
  static QK_INLINE void dot_in_place(Sum& acc, __m512i w, __m512i x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  }
  static QK_INLINE __m512 to_float(Sum acc) { return acc; }
  // The difference between the value of a code (without zero point) and its operand, a constant.
  static float code_shift(const LowbitLinearCall&) { return 0.0f; }

  template <int Bits>
  struct Decoder {
    static constexpr int kOperands = word_codes(Bits) / 2;
    // A lookup takes the lowest five bits of each element. Where these are the bits of several codes there is a table
    // for each of those codes, which saves the shifts between them.
    static constexpr int kStep = Bits == 3 || Bits == 5 ? 8 : Bits, kTables = kStep < 5 ? 5 / kStep : 1;
    __m512i levels[kTables];
    __m512 low;

    explicit Decoder(const LowbitLinearCall& call)
        : low(_mm512_set1_ps(static_cast<float>(call.code_min + call.offset))) {
      for (int t = 0; t < kTables; ++t) {
        alignas(64) uint16_t table[32];
        for (int i = 0; i < 32; ++i) {
          const int code = (i >> (kStep * t)) % (1 << std::min(Bits, 5));
          const float level = static_cast<float>(code + call.code_min + call.offset);
          uint32_t bits;
          std::memcpy(&bits, &level, 4);
          table[i] = static_cast<uint16_t>(bits >> 16);  // at most eight significant bits: exact
        }
        levels[t] = _mm512_load_si512(table);
      }
    }
    QK_INLINE __m512i operand(__m512i word, int j) const {
      if constexpr (Bits <= 5) {
        const int first = j - j % kTables;
        const __m512i codes = first ? _mm512_srli_epi16(word, static_cast<unsigned>(kStep * first)) : word;
        return _mm512_permutexvar_epi16(codes, levels[j % kTables]);
      } else {
        const __m512i codes = j ? _mm512_srli_epi16(word, 8) : _mm512_and_si512(word, _mm512_set1_epi32(0x00FF00FF));
        const __m512 even = _mm512_add_ps(_mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(0xFFFF))), low);
        const __m512 odd = _mm512_add_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(codes, 16)), low);
        return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(_mm512_castps_si512(even), 16),
                                       _mm512_castps_si512(odd));
      }
    }
  };
};
#endif

struct Int8Fours {
  using Element = uint8_t;
  using Sum = __m512i;
  static QK_INLINE Sum zero() { return _mm512_setzero_si512(); }
  static QK_INLINE Sum dot(Sum acc, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(acc, w, x); }
  static QK_INLINE void dot_in_place(Sum& acc, __m512i w, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  }
  static QK_INLINE __m512 to_float(Sum acc) { return _mm512_cvtepi32_ps(acc); }
  static float code_shift(const LowbitLinearCall& call) { return static_cast<float>(call.offset + call.code_min); }

  template <int Bits>
  struct Decoder {
    static constexpr int kOperands = word_codes(Bits) / 4;
    explicit Decoder(const LowbitLinearCall&) {}
    QK_INLINE __m512i operand(__m512i word, int j) const {
      if constexpr (Bits == 1 || Bits == 2 || Bits == 4)
        return _mm512_and_si512(j ? _mm512_srli_epi32(word, static_cast<unsigned>(Bits * j)) : word,
                                _mm512_set1_epi8((1 << Bits) - 1));
      else
        return word;
    }
  };
};

}  // namespace QK_ISA
}  // namespace qk
#endif
