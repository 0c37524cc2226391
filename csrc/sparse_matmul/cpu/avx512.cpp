// sparse_matmul, AVX-512 (F, VL).
// Idea     bitmap: vexpandps from memory, 16 values at once. sell: one gather for 16 outputs.
//          panels: one broadcast weight meets up to 32 rows of x, 2 FMAs with memory operands.
// Tile     bitmap: 32 outputs x 1 to 4 rows, 2 zmm sums a row. sell: 16 outputs x 1 to 3 rows.
//          panels: 8 outputs x 32 rows (16 zmm sums) or 16.
// Reads    formats/bitmap32.h, sell16.h, panels128.h; vexpandps reads no more than the values it uses.
// Tails    outputs: partly stored; k: none is padded; rows: smaller instances, 8 rows by the avx2 row.
// Measured docs/kernels/sparse_matmul.md
#include "../../runtime/simd/avx512.h"
#include "../../runtime/simd/transpose8_avx.inl"

namespace {

struct Lanes {
  __m512 v;
  static Lanes zero() { return {_mm512_setzero_ps()}; }
  static Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  static Lanes expand(const float* value, const float*, uint32_t mask) {
    return {_mm512_maskz_expandloadu_ps(static_cast<__mmask16>(mask), value)};
  }
  static __m512 broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Lanes fma(const Lanes& w, __m512 x, const Lanes& s) { return {_mm512_fmadd_ps(w.v, x, s.v)}; }
  static Lanes multiply_add(const Lanes& w, const Lanes& x, const Lanes& s) { return {_mm512_fmadd_ps(w.v, x.v, s.v)}; }
  struct Index {
    __m512i k;
    explicit Index(const uint8_t* p) {
      k = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    Lanes of(const float* x) const { return {_mm512_i32gather_ps(k, x, 4)}; }
  };
};
using Narrow = Lanes;
using Wide = Lanes;

// Four weights in one load; a shuffle broadcasts one of them, and the load units are left to x.
struct Four {
  __m512 v;
  explicit Four(const float* p) : v(_mm512_broadcast_f32x4(_mm_loadu_ps(p))) {}
  template <int kLane>
  __m512 at() const {
    return _mm512_permute_ps(v, kLane * 0x55);
  }
};

}  // namespace

#include "kernels.inl"
#include "panels.inl"
#include "slices_avx512.inl"
// Behind these two:
#include "blocks.inl"
#include "nm.inl"

namespace {

void bitmap(const FewArgs& a) {
  switch (a.rows) {
    case 1: return bitmap_rows<Narrow, 1>(a);
    case 2: return bitmap_rows<Wide, 2>(a);
    case 3: return bitmap_rows<Wide, 3>(a);
    default: return bitmap_rows<Wide, 4>(a);
  }
}

// out[j * out_stride + i] = in[i * in_stride + j], 16 x 16: whole lines are read and written.
inline void transpose16x16(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m512 a[16], b[16];
  const auto low = [](__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  const auto high = [](__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + i * in_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  // a[4 * g + j]: in its quarter q column 4 * q + j of rows 4 * g to 4 * g + 3
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = low(b[i], b[i + 2]);
    a[i + 1] = high(b[i], b[i + 2]);
    a[i + 2] = low(b[i + 1], b[i + 3]);
    a[i + 3] = high(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even_top = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88),
                 odd_top = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const __m512 even_bottom = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 odd_bottom = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_ps(out + j * out_stride, _mm512_shuffle_f32x4(even_top, even_bottom, 0x88));
    _mm512_storeu_ps(out + (4 + j) * out_stride, _mm512_shuffle_f32x4(odd_top, odd_bottom, 0x88));
    _mm512_storeu_ps(out + (8 + j) * out_stride, _mm512_shuffle_f32x4(even_top, even_bottom, 0xdd));
    _mm512_storeu_ps(out + (12 + j) * out_stride, _mm512_shuffle_f32x4(odd_top, odd_bottom, 0xdd));
  }
}

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

void panels(const PanelArgs& a) {
  switch (a.lanes) {
    case 8: return kAvx2.panels(a);  // half a zmm: that row has the kernel, and the same sums
    case 16: return panel_lanes<1, 8>(a);
    default: return panel_lanes<2, 8>(a);
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

const Kernels fs::sparse_matmul::kAvx512 = {
    "avx512", fs::isa::Level::avx512, fs::isa::kLevelAvx512, &bitmap,    &sell,    &panels, &transpose_wide,
    &finish,  &block_slices,          &block_panel,          &nm_slices, &nm_panel};
