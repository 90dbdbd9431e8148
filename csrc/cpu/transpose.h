// Transposition in AVX-512 registers.
#pragma once

#include "simd.h"

#if defined(__AVX512F__)
namespace qk {
namespace QK_ISA {

// Sixteen times sixteen 32-bit elements, in place.
QK_INLINE void transpose(__m512i t[16]) {
  __m512i a[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(t[i], t[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(t[i], t[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    t[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    t[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    t[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    t[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xDD);
    a[i + 8] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xDD);
    t[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xDD);
  }
}

}  // namespace QK_ISA
}  // namespace qk
#endif
