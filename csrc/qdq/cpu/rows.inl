// How a float becomes an int8 code: the one place for every family that quantizes (qdq writes plain codes, int8_gemm
// the panels of its tiles). Included after one of runtime/simd/{scalar,avx2,avx512}.h.
#pragma once
#include <float.h>
#include <stdint.h>
#include <string.h>

namespace {

// The largest |x| of a row as an integer: the bit patterns of |x| are ordered NaN > inf > every finite value.
// Prefetches kAhead bytes ahead of its reads; 0: not at all.
template <int kAhead = 0, class T>
inline int32_t absmax_bits(const T* x, int64_t k) {
  using S = Simd;
  constexpr int kGroup = 4 * S::kWidth;
  S::I m0 = S::set1_s32(0), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  for (; i + kGroup <= k; i += kGroup) {
    if constexpr (kAhead > 0) {
      const char* ahead = reinterpret_cast<const char*>(x + i) + kAhead;
      for (int line = 0; line < kGroup * static_cast<int>(sizeof(T)); line += 64) __builtin_prefetch(ahead + line);
    }
    m0 = S::max_s32(m0, S::abs_bits(S::load(x + i)));
    m1 = S::max_s32(m1, S::abs_bits(S::load(x + i + S::kWidth)));
    m2 = S::max_s32(m2, S::abs_bits(S::load(x + i + 2 * S::kWidth)));
    m3 = S::max_s32(m3, S::abs_bits(S::load(x + i + 3 * S::kWidth)));
  }
  for (; i + S::kWidth <= k; i += S::kWidth) m0 = S::max_s32(m0, S::abs_bits(S::load(x + i)));
  if (i < k) m1 = S::max_s32(m1, S::abs_bits(S::load_n(x + i, static_cast<int>(k - i))));
  return S::reduce_max_s32(S::max_s32(S::max_s32(m0, m1), S::max_s32(m2, m3)));
}

// The vector at x, of which only `count` elements (any number, also <= 0) are there; the others read as 0.
template <class T>
inline Simd::F load_up_to(const T* x, int count) {
  if (count >= Simd::kWidth) return Simd::load(x);
  return count > 0 ? Simd::load_n(x, count) : Simd::set1(0.0f);
}

// Dynamic, symmetric: the scale of a row with that absmax_bits(). false: the row holds a NaN or an infinity, its scale
// is NaN and its codes are to be 0.
inline bool row_scale(int32_t bits, float* scale) {
  if (bits >= 0x7f800000) {
    *scale = __builtin_nanf("");
    return false;
  }
  float absmax;
  memcpy(&absmax, &bits, 4);
  *scale = absmax / 127.0f;
  if (*scale < FLT_MIN) *scale = FLT_MIN;  // 1 / scale stays finite; a tiny row just uses fewer of the codes
  if (bits == 0) *scale = 1.0f;
  return true;
}

inline Simd::I dynamic_code(Simd::F x, Simd::F inverse_scale) { return Simd::round_s32(Simd::mul(x, inverse_scale)); }

// Static: round(x / scale) + zero_point, NaN as the zero point, in [-384, 383] and not yet clamped to the codes there
// are. Clamped before the conversion: beyond +-256 the code saturates whatever the zero point is.
inline Simd::I static_code(Simd::F x, Simd::F inverse_scale, Simd::I zero_point) {
  using S = Simd;
  const S::F t = S::nan_to_zero(S::mul(x, inverse_scale));
  return S::add_s32(S::round_s32(S::max(S::set1(-256.0f), S::min(S::set1(256.0f), t))), zero_point);
}

}  // namespace
