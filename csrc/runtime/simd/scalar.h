// The vector type of the scalar level: one lane. It states in plain C what every level does bit for bit.
#pragma once
#include <stdint.h>
#include <string.h>

#include "half.h"

namespace {

inline float f32_from_bits(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline uint32_t bits_from_f32(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

struct Simd {
  using F = float;
  using I = int32_t;
  static constexpr int kWidth = 1;

  static F set1(float x) { return x; }
  static I set1_s32(int32_t x) { return x; }

  static F load(const float* p) { return *p; }
  static F load(const fs::bf16* p) { return f32_from_bits(uint32_t{p->bits} << 16); }
  static F load(const fs::f16* p) {
    const uint32_t sign = (uint32_t{p->bits} & 0x8000) << 16, rest = uint32_t{p->bits} & 0x7fff;
    if (rest >= 0x7c00) return f32_from_bits(sign | 0x7f800000 | (rest << 13) | (rest > 0x7c00 ? 0x400000 : 0));
    // The exponent is rebiased by a multiplication, which also makes subnormals normal.
    return f32_from_bits(sign | bits_from_f32(f32_from_bits(rest << 13) * 0x1p112f));
  }
  static void store(float* p, F x) { *p = x; }
  static void store(fs::bf16* p, F x) {
    const uint32_t u = bits_from_f32(x);
    p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  static void store(fs::f16* p, F x) {
    const uint32_t u = bits_from_f32(x), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
    uint32_t h;
    if (rest > 0x7f800000) {
      h = 0x7e00 | ((rest >> 13) & 0x3ff);
    } else if (rest >= 0x477ff000) {  // rounds to beyond 65504
      h = 0x7c00;
    } else if (rest < 0x38800000) {  // subnormal: an addition aligns and rounds
      h = bits_from_f32(f32_from_bits(rest) + 0.5f) - 0x3f000000;
    } else {
      h = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
    }
    p->bits = static_cast<uint16_t>(sign | h);
  }
  // The first n lanes, n < kWidth; the others read as 0. Nothing beyond is touched.
  template <class T>
  static F load_n(const T*, int) {
    return 0;
  }
  template <class T>
  static void store_n(T*, F, int) {}

  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
  static F min(F a, F b) { return a < b ? a : b; }  // b where one is NaN
  static F max(F a, F b) { return a > b ? a : b; }  // likewise
  static F abs(F a) { return f32_from_bits(bits_from_f32(a) & 0x7fffffff); }
  static F nan_to_zero(F a) { return a == a ? a : 0; }
  static F select_negative(F x, F negative, F other) { return x < 0 ? negative : other; }
  static F zero_where_equal(F a, F b, F x) { return a == b ? 0 : x; }
  // The low 9 bits as sign and exponent, the rest 0: 2^n for a = 1.5 * 2^23 + 127 + n, n whole, in [-126, 127].
  static F low_bits_to_exponent(F a) { return f32_from_bits(bits_from_f32(a) << 23); }
  static F round(F a) { return __builtin_rintf(a); }  // half to even
  static I round_s32(F a) { return static_cast<I>(__builtin_rintf(a)); }
  static F to_f32(I a) { return static_cast<F>(a); }
  static F exp2_of(F n) {  // 2^n, n whole, in [-126, 127]
    return f32_from_bits(static_cast<uint32_t>(static_cast<I>(n) + 127) << 23);
  }

  static F max_across(F a) { return a; }

  static I load_s32(const int32_t* p) { return *p; }
  static I load_s32_n(const int32_t*, int) { return 0; }
  static I add_s32(I a, I b) { return a + b; }
  static I min_s32(I a, I b) { return a < b ? a : b; }
  static I max_s32(I a, I b) { return a > b ? a : b; }
  static I abs_bits(F a) { return static_cast<I>(bits_from_f32(a) & 0x7fffffff); }
  static int32_t reduce_max_s32(I a) { return a; }

  // Bytes. pack_s8: 4 vectors of s32, each lane clamped to [-128, 127], as 4 * kWidth s8 in one vector.
  static I pack_s8(I q0, I q1, I q2, I q3) {
    const I lanes[4] = {q0, q1, q2, q3};
    I packed = 0;
    for (int i = 0; i < 4; ++i) {
      const auto s8 = static_cast<int8_t>(max_s32(-128, min_s32(127, lanes[i])));
      memcpy(reinterpret_cast<int8_t*>(&packed) + i, &s8, 1);
    }
    return packed;
  }
  static void store_s8(int8_t* p, I packed) { memcpy(p, &packed, sizeof packed); }
  // One vector of s32 as kWidth s8, clamped; _n: the first n of them.
  static void store_as_s8(int8_t* p, I q) { *p = static_cast<int8_t>(max_s32(-128, min_s32(127, q))); }
  static void store_as_s8_n(int8_t*, I, int) {}
  static I load_s8(const int8_t* p) { return *p; }  // kWidth s8 as s32
  static I load_s8_n(const int8_t*, int) { return 0; }
  static I sub_s32(I a, I b) { return a - b; }

  // Stores past the caches, where the level has them; p at a multiple of the bytes stored. stream_end() before another
  // thread may read.
  static void stream_s8(int8_t* p, I packed) { store_s8(p, packed); }
  template <class T>
  static void stream(T* p, F x) {
    store(p, x);
  }
  static void stream_end() {}

  // One bit a lane, lane 0 lowest: low <= q <= high, and x is not NaN.
  static uint32_t inside_bits(I q, I low, I high, F x) { return low <= q && q <= high && x == x; }
  static F keep(F x, uint32_t bits) { return bits & 1 ? x : 0; }  // lanes whose bit is 0 become 0
};

}  // namespace
