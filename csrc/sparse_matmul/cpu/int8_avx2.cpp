// sparse_int8_linear, AVX2: exact over the whole range of s8: codes of x are s16, weights are widened as they come,
// vpmaddwd cannot saturate (vpmaddubsw does).
// Tile     blocks: 8 rows of x in a ymm, 4 codes are two dwords of two s16. bitmap: 4 outputs x two partial sums.
// Bound    1x4: per 4 products of 8 rows two vpmaddwd and two vpaddd, as a dense kernel.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

struct Lanes {
  static constexpr int kWidth = 8;
  static constexpr int kSteps = 2;
  static constexpr bool kXOuter = false;
  static constexpr int kQuadVecs = 2;
  static constexpr bool kFourWeights = false;
  using V = __m256i;
  struct X {  // where it is read: a memory operand needs no register
    const uint8_t* low;
    const uint8_t* high;
  };
  struct Weight {
    __m256i low, high;
  };
  static V zero() { return _mm256_setzero_si256(); }
  static V set1(int32_t v) { return _mm256_set1_epi32(v); }
  static V load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(int32_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static V add(V a, V b) { return _mm256_add_epi32(a, b); }
  static Weight weight(const int8_t* p) {
    int32_t four;
    memcpy(&four, p, 4);
    const __m128i s16 = _mm_cvtepi8_epi16(_mm_cvtsi32_si128(four));
    return {_mm256_broadcastd_epi32(s16), _mm256_broadcastd_epi32(_mm_srli_epi64(s16, 32))};
  }
  static X x(const uint8_t* p, int64_t stride) { return {p, p + stride}; }
  static V dot(V sum, X x, Weight w) {
    const auto at = [](const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
    return add(add(sum, _mm256_madd_epi16(at(x.low), w.low)), _mm256_madd_epi16(at(x.high), w.high));
  }
};

struct Few {
  static constexpr int kCodeBytes = 2;
  using X = __m256i;
  using Sum = __m256i;
  static X x(const uint8_t* p) {
    int64_t four;
    memcpy(&four, p, 8);
    return _mm256_set1_epi64x(four);
  }
  static Sum zero() { return _mm256_setzero_si256(); }
  static Sum dot(Sum sum, __m128i w, X x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_cvtepi8_epi16(w), x));
  }
  static __m128i finish(Sum sum) {
    return _mm_hadd_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  }
};

}  // namespace

#include "int8_bitmap_bytes.inl"
#include "int8_blocks.inl"

namespace {
using Code = int16_t;
}  // namespace

#include "int8_windows_plain.inl"

const Kernels fs::sparse_matmul::int8::kAvx2 = {"avx2",
                                                fs::isa::Level::avx2,
                                                fs::isa::kLevelAvx2,
                                                &fs::int8_gemm::kAvx2,
                                                &fs::sparse_matmul::kAvx2,
                                                2,
                                                Lanes::kWidth,
                                                &bitmap,
                                                &windows,
                                                &blocks};
