// The vector type of the AVX-512 level (F, BW, VL, DQ): 16 lanes. scalar.h says what each function means.
#pragma once
#include <immintrin.h>

#include "half.h"

namespace {

struct Simd {
  using F = __m512;
  using I = __m512i;
  static constexpr int kWidth = 16;

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

  static F set1(float x) { return _mm512_set1_ps(x); }
  static I set1_s32(int32_t x) { return _mm512_set1_epi32(x); }

  static F widen_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
  static __m256i round_bf16(F x) {
    const I u = _mm512_castps_si512(x);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), set1_s32(1));
    I r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, set1_s32(0x7fff))), 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), set1_s32(0x7fc0));
    return _mm512_cvtepi32_epi16(r);
  }

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const fs::bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load(const fs::f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(fs::bf16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16(x)); }
  static void store(fs::f16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static F load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static F load_n(const fs::bf16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
  static F load_n(const fs::f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static void store_n(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
  static void store_n(fs::bf16* p, F x, int n) { _mm256_mask_storeu_epi16(p, first(n), round_bf16(x)); }
  static void store_n(fs::f16* p, F x, int n) {
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F nan_to_zero(F a) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a); }
  static F select_negative(F x, F negative, F other) {
    return _mm512_mask_mov_ps(other, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), negative);
  }
  static F zero_where_equal(F a, F b, F x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ), x); }
  static F low_bits_to_exponent(F a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 23)); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static I round_s32(F a) { return _mm512_cvtps_epi32(a); }
  static F to_f32(I a) { return _mm512_cvtepi32_ps(a); }
  static F exp2_of(F n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), set1_s32(127)), 23));
  }

  static float max_across(F a) { return _mm512_reduce_max_ps(a); }

  static I load_s32(const int32_t* p) { return _mm512_loadu_si512(p); }
  static I load_s32_n(const int32_t* p, int n) { return _mm512_maskz_loadu_epi32(first(n), p); }
  static I add_s32(I a, I b) { return _mm512_add_epi32(a, b); }
  static I min_s32(I a, I b) { return _mm512_min_epi32(a, b); }
  static I max_s32(I a, I b) { return _mm512_max_epi32(a, b); }
  static I abs_bits(F a) { return _mm512_castps_si512(abs(a)); }
  static int32_t reduce_max_s32(I a) { return _mm512_reduce_max_epi32(a); }

  static I pack_s8(I q0, I q1, I q2, I q3) {
    // The packs work in quarters; the permutation gathers dword i of quarter j from place 4 * i + j.
    const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const I s8 = _mm512_packs_epi16(_mm512_packs_epi32(q0, q1), _mm512_packs_epi32(q2, q3));
    return _mm512_permutexvar_epi32(order, s8);
  }
  static void store_s8(int8_t* p, I packed) { _mm512_storeu_si512(p, packed); }
  static void store_as_s8(int8_t* p, I q) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(q)); }
  static void store_as_s8_n(int8_t* p, I q, int n) { _mm_mask_storeu_epi8(p, first(n), _mm512_cvtsepi32_epi8(q)); }
  static I load_s8(const int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_s8_n(const int8_t* p, int n) { return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)); }
  static I sub_s32(I a, I b) { return _mm512_sub_epi32(a, b); }

  static void stream_s8(int8_t* p, I packed) { _mm512_stream_si512(reinterpret_cast<I*>(p), packed); }
  static void stream(float* p, F x) { _mm512_stream_ps(p, x); }
  static void stream(fs::bf16* p, F x) { store(p, x); }  // half a vector: no gain
  static void stream(fs::f16* p, F x) { store(p, x); }
  static void stream_end() { _mm_sfence(); }

  static uint32_t inside_bits(I q, I low, I high, F x) {
    return _mm512_cmple_epi32_mask(low, q) & _mm512_cmple_epi32_mask(q, high) & _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
  }
  static F keep(F x, uint32_t bits) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x); }
};

}  // namespace
