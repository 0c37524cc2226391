// The vector type of the AVX2 level (AVX2, FMA, F16C): 8 lanes. scalar.h says what each function means.
#pragma once
#include <immintrin.h>
#include <string.h>

#include "half.h"

namespace {

struct Simd {
  using F = __m256;
  using I = __m256i;
  static constexpr int kWidth = 8;

  static F set1(float x) { return _mm256_set1_ps(x); }
  static I set1_s32(int32_t x) { return _mm256_set1_epi32(x); }

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const fs::bf16* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static F load(const fs::f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static __m128i round_bf16(F x) {
    const I u = _mm256_castps_si256(x);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), set1_s32(1));
    I r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, set1_s32(0x7fff))), 16);
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, set1_s32(0x7fc0), nan);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08));
  }
  static void store(fs::bf16* p, F x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round_bf16(x)); }
  static void store(fs::f16* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  template <class T>
  static F load_n(const T* p, int n) {
    T lanes[kWidth] = {};
    memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
    return load(lanes);
  }
  template <class T>
  static void store_n(T* p, F x, int n) {
    T lanes[kWidth];
    store(lanes, x);
    memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
  }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F abs(F a) { return _mm256_and_ps(a, _mm256_castsi256_ps(set1_s32(0x7fffffff))); }
  static F nan_to_zero(F a) { return _mm256_and_ps(a, _mm256_cmp_ps(a, a, _CMP_ORD_Q)); }
  static F select_negative(F x, F negative, F other) {
    return _mm256_blendv_ps(other, negative, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ));
  }
  static F zero_where_equal(F a, F b, F x) { return _mm256_and_ps(x, _mm256_cmp_ps(a, b, _CMP_NEQ_UQ)); }
  static F low_bits_to_exponent(F a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23)); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static I round_s32(F a) { return _mm256_cvtps_epi32(a); }
  static F to_f32(I a) { return _mm256_cvtepi32_ps(a); }
  static F exp2_of(F n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), set1_s32(127)), 23));
  }

  static float max_across(F a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }

  static I load_s32(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static I load_s32_n(const int32_t* p, int n) {
    int32_t lanes[kWidth] = {};
    memcpy(lanes, p, static_cast<size_t>(n) * sizeof(int32_t));
    return load_s32(lanes);
  }
  static I add_s32(I a, I b) { return _mm256_add_epi32(a, b); }
  static I min_s32(I a, I b) { return _mm256_min_epi32(a, b); }
  static I max_s32(I a, I b) { return _mm256_max_epi32(a, b); }
  static I abs_bits(F a) { return _mm256_castps_si256(abs(a)); }
  static int32_t reduce_max_s32(I a) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtsi128_si32(m);
  }

  static I pack_s8(I q0, I q1, I q2, I q3) {  // the packs work in halves; the permutation puts groups of 4 right
    const I s8 = _mm256_packs_epi16(_mm256_packs_epi32(q0, q1), _mm256_packs_epi32(q2, q3));
    return _mm256_permutevar8x32_epi32(s8, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  static void store_s8(int8_t* p, I packed) { _mm256_storeu_si256(reinterpret_cast<I*>(p), packed); }
  static void store_as_s8(int8_t* p, I q) {
    const __m128i s16 = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(s16, s16));
  }
  static void store_as_s8_n(int8_t* p, I q, int n) {
    int8_t lanes[kWidth];
    store_as_s8(lanes, q);
    memcpy(p, lanes, static_cast<size_t>(n));
  }
  static I load_s8(const int8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_s8_n(const int8_t* p, int n) {
    int8_t lanes[kWidth] = {};
    memcpy(lanes, p, static_cast<size_t>(n));
    return load_s8(lanes);
  }
  static I sub_s32(I a, I b) { return _mm256_sub_epi32(a, b); }

  static void stream_s8(int8_t* p, I packed) { _mm256_stream_si256(reinterpret_cast<I*>(p), packed); }
  static void stream(float* p, F x) { _mm256_stream_ps(p, x); }
  static void stream(fs::bf16* p, F x) { store(p, x); }  // half a vector: no gain
  static void stream(fs::f16* p, F x) { store(p, x); }
  static void stream_end() { _mm_sfence(); }

  static uint32_t inside_bits(I q, I low, I high, F x) {
    const I outside = _mm256_or_si256(_mm256_cmpgt_epi32(low, q), _mm256_cmpgt_epi32(q, high));
    const F bad = _mm256_or_ps(_mm256_castsi256_ps(outside), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return static_cast<uint32_t>(_mm256_movemask_ps(bad)) ^ 0xff;
  }
  static F keep(F x, uint32_t bits) {
    const I lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const I set = _mm256_and_si256(set1_s32(static_cast<int32_t>(bits)), lane_bit);
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane_bit)));
  }
};

}  // namespace
