// A 16 x 16 transpose in 512-bit registers, for the AVX-512 levels.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

// store(j, v) with v[i] = in[i * in_stride + j], for each j.
template <class Store>
inline void transpose_tile(const float* in, int64_t in_stride, const Store& store) {
  __m512 a[16], b[16];
  const auto low = [](__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  const auto high = [](__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + i * in_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  // a[4 * g + j]: in its quarter q column 4 * q + j of rows 4 * g to 4 * g + 3
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = low(b[i], b[i + 2]);
    a[i + 1] = high(b[i], b[i + 2]);
    a[i + 2] = low(b[i + 1], b[i + 3]);
    a[i + 3] = high(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even_top = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88),
                 odd_top = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const __m512 even_bottom = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 odd_bottom = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    store(j, _mm512_shuffle_f32x4(even_top, even_bottom, 0x88));
    store(4 + j, _mm512_shuffle_f32x4(odd_top, odd_bottom, 0x88));
    store(8 + j, _mm512_shuffle_f32x4(even_top, even_bottom, 0xdd));
    store(12 + j, _mm512_shuffle_f32x4(odd_top, odd_bottom, 0xdd));
  }
}

}  // namespace
