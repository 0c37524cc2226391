// sparse_matmul, AVX-512 (F, VL).
// Idea     bitmap: bitmap32_avx512.inl, with VBMI2 in a row of its own for bfloat16. sell8: sell8_avx512.inl.
//          sell16: the avx2 row's. panels: one broadcast weight meets up to 32 rows of x, 2 FMAs with memory operands.
// Tile     panels: 8 outputs x 32 rows (16 zmm sums) or 16.
// Reads    formats/bitmap32.h, bitmap16.h, sell16.h, sell8.h, panels128.h.
// Tails    outputs: partly stored; k: none is padded; rows: smaller instances, 8 rows by the avx2 row.
// Measured docs/kernels/sparse_matmul.md
#include "../../runtime/simd/avx512.h"
#include "../../runtime/simd/transpose16_avx512.inl"
#include "../../runtime/simd/transpose8_avx.inl"

namespace {

// Four weights in one load; a shuffle broadcasts one of them, and the load units are left to x.
struct Four {
  using Value = float;
  static constexpr int kCount = 4;
  __m512 v;
  explicit Four(const float* p) : v(_mm512_broadcast_f32x4(_mm_loadu_ps(p))) {}
  template <int kLane>
  __m512 at() const {
    return _mm512_permute_ps(v, kLane * 0x55);
  }
};

// Eight in one load, at a shuffle across the register, which takes longer.
struct Eight {
  using Value = float;
  static constexpr int kCount = 8;
  __m512 v;
  explicit Eight(const float* p) : v(_mm512_castps256_ps512(_mm256_loadu_ps(p))) {}
  template <int kLane>
  __m512 at() const {
    return _mm512_permutexvar_ps(_mm512_set1_epi32(kLane), v);
  }
};

// Eight of bfloat16 in one load: a mask leaves the odd ones, widened, a shift the even ones.
struct EightBf16 {
  using Value = uint16_t;
  static constexpr int kCount = 8;
  __m512 odd, even;
  explicit EightBf16(const uint16_t* p) {
    const __m512i v = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    odd = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(-65536)));
    even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
  }
  template <int kLane>
  __m512 at() const {
    return _mm512_permute_ps(kLane % 2 == 1 ? odd : even, kLane / 2 * 0x55);
  }
};

// out[j * out_stride + i] = in[i * in_stride + j], 16 x 16: whole lines are read and written.
inline void transpose16x16(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  transpose_tile(in, in_stride, [&](int64_t j, __m512 v) { _mm512_storeu_ps(out + j * out_stride, v); });
}

}  // namespace

#include "kernels.inl"
#include "panels.inl"
#include "slices_avx512.inl"
// Behind these two:
#include "blocks.inl"
#include "nm.inl"

#include "bitmap32_avx512.inl"
#include "sell8_avx512.inl"

namespace {

struct Dot {
  using F = __m512;
  using Half = __m512;
  using Four = __m128;
  static constexpr int kWidth = 16;
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // Per quarter: (lane 0 + lane 2) + (lane 1 + lane 3) of a, b, c, d.
  static Half fold(F a, F b, F c, F d) {
    const F ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const F cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d ab_pd = _mm512_castps_pd(ab), cd_pd = _mm512_castps_pd(cd);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab_pd, cd_pd)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(ab_pd, cd_pd)));
  }
  static Four sum(Half h) {
    const __m256 high = _mm512_extractf32x8_ps(h, 1);
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(h), high);
    return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
  }
  static __mmask8 first(int n) { return static_cast<__mmask8>((1u << n) - 1); }
  static void store(float* p, Four v) { _mm_storeu_ps(p, v); }
  static void store(float* p, Four v, int n) { _mm_mask_storeu_ps(p, first(n), v); }
  static void add(float* p, Four v) { _mm_storeu_ps(p, _mm_add_ps(_mm_loadu_ps(p), v)); }
  static void add(float* p, Four v, int n) {
    _mm_mask_storeu_ps(p, first(n), _mm_add_ps(_mm_maskz_loadu_ps(first(n), p), v));
  }
};

}  // namespace

#include "sddmm.inl"

namespace {

void transpose_wide(const TransposeArgs& t) {
  const int64_t rows = t.rows & ~15, columns = t.columns & ~15;
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < columns; c += 16)
      transpose16x16(t.in + r * t.in_stride + c, t.in_stride, t.out + c * t.out_stride + r, t.out_stride);
  if (columns < t.columns)
    transpose({t.in + columns, t.in_stride, rows, t.columns - columns, t.out + columns * t.out_stride, t.out_stride});
  if (rows < t.rows)
    transpose({t.in + rows * t.in_stride, t.in_stride, t.rows - rows, t.columns, t.out + rows, t.out_stride});
}

// A gather takes 20 cycles on Zen 5, where the avx2 row's sixteen loads take 12.
void sell16(const FewArgs& a) { kAvx2.sell16(a); }

void sell4(const FewArgs& a) { kAvx2.sell4(a); }  // sell8 is the format for wide registers

void panels(const PanelArgs& a) {
  switch (a.lanes) {
    case 8: return kAvx2.panels(a);  // half a zmm: that row has the kernel, and the same sums
    case 16: return a.pack.value16 == nullptr ? panel_lanes<1, 8, Four>(a) : panel_lanes<1, 8, EightBf16>(a);
    default: return a.pack.value16 == nullptr ? panel_lanes<2, 8, Eight>(a) : panel_lanes<2, 8, EightBf16>(a);
  }
}

void block_panel(const TileArgs& a) {
  switch (a.lanes) {
    case 8: return kAvx2.block_panel(a);
    case 16: return block_panel_of<16>(a);
    case 32: return block_panel_of<32>(a);
    default: return block_panel_of<64>(a);
  }
}

void nm_panel(const TileArgs& a) {
  switch (a.lanes) {
    case 8: return kAvx2.nm_panel(a);
    case 16: return nm_panel_of<16>(a);
    case 32: return nm_panel_of<32>(a);
    default: return nm_panel_of<64>(a);
  }
}

}  // namespace

const Kernels fs::sparse_matmul::kAvx512 = {"avx512",
                                            fs::isa::Level::avx512,
                                            fs::isa::kLevelAvx512,
                                            &bitmap,
                                            &bitmap_bf16,
                                            &sell16,
                                            &sell8,
                                            &sell4,
                                            &panels,
                                            &transpose_wide,
                                            &finish,
                                            &finish_columns,
                                            &sample_block,
                                            &activation_grad_block,
                                            &block_slices,
                                            &block_panel,
                                            &nm_slices,
                                            &nm_panel};

const Kernels fs::sparse_matmul::kAvx512Vbmi2 = {"avx512vbmi2",
                                                 fs::isa::Level::avx512,
                                                 fs::isa::kLevelAvx512 | fs::isa::kAvx512Vbmi2,
                                                 &bitmap,
                                                 &bitmap_bf16_vbmi2,
                                                 &sell16,
                                                 &sell8,
                                                 &sell4,
                                                 &panels,
                                                 &transpose_wide,
                                                 &finish,
                                                 &finish_columns,
                                                 &sample_block,
                                                 &activation_grad_block,
                                                 &block_slices,
                                                 &block_panel,
                                                 &nm_slices,
                                                 &nm_panel};
