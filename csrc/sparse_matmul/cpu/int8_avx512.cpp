// sparse_int8_linear, AVX-512-VNNI without VBMI2 (Cascade Lake): blocks as everywhere on AVX-512, bitmaps by vpshufb.
#include "int8_lanes_avx512.inl"

namespace {
inline __m128i dpbusd(__m128i sum, __m128i x, __m128i w) { return _mm_dpbusd_epi32(sum, x, w); }
}  // namespace

#include "int8_few_vnni.inl"
//
#include "int8_bitmap_bytes.inl"
#include "int8_blocks.inl"
#include "int8_columns_avx512.inl"

namespace {
using Code = uint8_t;
}  // namespace

#include "int8_windows_plain.inl"

const Kernels fs::sparse_matmul::int8::kAvx512 = {"avx512",
                                                  fs::isa::Level::avx512,
                                                  fs::isa::kLevelAvx512,
                                                  &fs::int8_gemm::kAvx512,
                                                  &fs::sparse_matmul::kAvx512,
                                                  2,
                                                  Lanes::kWidth,
                                                  &bitmap,
                                                  &windows,
                                                  &blocks,
                                                  &finish_columns};
