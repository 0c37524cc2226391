// 16 rows of x in a zmm, vpdpbusd: what int8_blocks.inl asks for, of both AVX-512 rows.
// Bound    1x4: 4 vpdpbusd on two ports, 4 loads of x on two, and for eight blocks two loads of weights and one of
//          indices: 2.2 cycles a block, where a broadcast and an index for each made it 3. 4x4: 16 vpdpbusd, 8 cycles;
//          9 loads: VNNI.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

struct Lanes {
  static constexpr int kWidth = 16;
  static constexpr int kSteps = 1;
  static constexpr bool kXOuter = true;
  static constexpr int kQuadVecs = 4;
  static constexpr bool kFourWeights = true;
  using V = __m512i;
  using X = __m512i;
  using Weight = __m512i;
  static V zero() { return _mm512_setzero_si512(); }
  static V set1(int32_t v) { return _mm512_set1_epi32(v); }
  static V load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store(int32_t* p, V v) { _mm512_storeu_si512(p, v); }
  static V add(V a, V b) { return _mm512_add_epi32(a, b); }
  static Weight weight(const int8_t* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  using FourWeights = __m512i;
  static FourWeights four_weights(const int8_t* p) {
    FourWeights w = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    asm("" : "+v"(w));  // or gcc 12 makes broadcasts from memory of the shuffles
    return w;
  }
  template <int kBlock>
  static Weight weight(FourWeights w) {
    return _mm512_shuffle_epi32(w, static_cast<_MM_PERM_ENUM>(kBlock * 0x55));
  }
  static X x(const uint8_t* p, int64_t) { return _mm512_loadu_si512(p); }
  static V dot(V sum, X x, Weight w) { return _mm512_dpbusd_epi32(sum, x, w); }
};

}  // namespace
