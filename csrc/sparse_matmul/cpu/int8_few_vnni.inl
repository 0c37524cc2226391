// 4 outputs x 4 k by a 128-bit vpdpbusd: what int8_bitmap_bytes.inl asks for, where `FEW_DPBUSD` is there.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

struct Few {
  static constexpr int kCodeBytes = 1;
  using X = __m128i;
  using Sum = __m128i;
  static X x(const uint8_t* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm_set1_epi32(four);
  }
  static Sum zero() { return _mm_setzero_si128(); }
  static Sum dot(Sum sum, __m128i w, X x) { return dpbusd(sum, x, w); }
  static __m128i finish(Sum sum) { return sum; }
};

}  // namespace
