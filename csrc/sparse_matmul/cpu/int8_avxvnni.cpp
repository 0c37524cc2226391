// sparse_int8_linear, AVX-VNNI: 8 rows of x in a ymm; bitmaps by vpshufb.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

inline __m128i dpbusd(__m128i sum, __m128i x, __m128i w) { return _mm_dpbusd_avx_epi32(sum, x, w); }

struct Lanes {
  static constexpr int kWidth = 8;
  static constexpr int kSteps = 1;
  static constexpr bool kXOuter = true;
  static constexpr int kQuadVecs = 2;  // 8 sums, 4 weights, 1 x of 16 registers
  static constexpr bool kFourWeights = false;
  using V = __m256i;
  using X = __m256i;
  using Weight = __m256i;
  static V zero() { return _mm256_setzero_si256(); }
  static V set1(int32_t v) { return _mm256_set1_epi32(v); }
  static V load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(int32_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static V add(V a, V b) { return _mm256_add_epi32(a, b); }
  static Weight weight(const int8_t* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  static X x(const uint8_t* p, int64_t) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static V dot(V sum, X x, Weight w) { return _mm256_dpbusd_avx_epi32(sum, x, w); }
};

}  // namespace

#include "int8_few_vnni.inl"
//
#include "int8_bitmap_bytes.inl"
#include "int8_blocks.inl"

namespace {
using Code = uint8_t;
}  // namespace

#include "int8_windows_plain.inl"

const Kernels fs::sparse_matmul::int8::kAvxVnni = {"avxvnni",
                                                   fs::isa::Level::avxvnni,
                                                   fs::isa::kLevelAvxVnni,
                                                   &fs::int8_gemm::kAvxVnni,
                                                   &fs::sparse_matmul::kAvx2,
                                                   2,
                                                   Lanes::kWidth,
                                                   &bitmap,
                                                   &windows,
                                                   &blocks};
