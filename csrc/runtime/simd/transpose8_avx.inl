// An 8 x 8 transpose in 256-bit registers, for the AVX2 and AVX-512 levels.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

// store(j, v) with v[i] = in[i * in_stride + j], for each j.
template <class Store>
inline void transpose8(const float* in, int64_t in_stride, const Store& store) {
  const auto row = [&](int64_t i) { return _mm256_loadu_ps(in + i * in_stride); };
  const auto low = [](__m256 a, __m256 b) {
    return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
  };
  const auto high = [](__m256 a, __m256 b) {
    return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
  };
  const __m256 a01 = _mm256_unpacklo_ps(row(0), row(1)), b01 = _mm256_unpackhi_ps(row(0), row(1));
  const __m256 a23 = _mm256_unpacklo_ps(row(2), row(3)), b23 = _mm256_unpackhi_ps(row(2), row(3));
  const __m256 a45 = _mm256_unpacklo_ps(row(4), row(5)), b45 = _mm256_unpackhi_ps(row(4), row(5));
  const __m256 a67 = _mm256_unpacklo_ps(row(6), row(7)), b67 = _mm256_unpackhi_ps(row(6), row(7));
  const __m256 top[4] = {low(a01, a23), high(a01, a23), low(b01, b23), high(b01, b23)};
  const __m256 bottom[4] = {low(a45, a67), high(a45, a67), low(b45, b67), high(b45, b67)};
  store(0, _mm256_permute2f128_ps(top[0], bottom[0], 0x20));
  store(1, _mm256_permute2f128_ps(top[1], bottom[1], 0x20));
  store(2, _mm256_permute2f128_ps(top[2], bottom[2], 0x20));
  store(3, _mm256_permute2f128_ps(top[3], bottom[3], 0x20));
  store(4, _mm256_permute2f128_ps(top[0], bottom[0], 0x31));
  store(5, _mm256_permute2f128_ps(top[1], bottom[1], 0x31));
  store(6, _mm256_permute2f128_ps(top[2], bottom[2], 0x31));
  store(7, _mm256_permute2f128_ps(top[3], bottom[3], 0x31));
}

// out[j * out_stride + i] = in[i * in_stride + j]
inline void transpose8x8(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  transpose8(in, in_stride, [&](int64_t j, __m256 v) { _mm256_storeu_ps(out + j * out_stride, v); });
}

}  // namespace
