// sparse_matmul, AVX2 (with FMA).
// Idea     bitmap: vpermps spreads eight values over a byte of the mask by a table of lanes; lanes that hold nothing
// are
//          negative there, and a blend by the sign clears them.
//          sell4: a step's 16 x lie in two registers, of which vpermps twice and a blend pick.
//          sell16, sell8: the elements of x are put together from scalar loads (gathers are slow here).
//          panels: one broadcast weight meets up to 32 rows of x, 4 FMAs with memory operands.
// Tile     bitmap: 32 outputs x 1 or 2 rows, 4 ymm sums a row, 16 outputs x 3 or 4 rows.
//          sell: 16 outputs x 1 to 4 rows. panels: 8 ymm sums: 2 outputs x 32 rows, 4 x 16 or 8 x 8.
// Reads    formats/bitmap32.h, bitmap16.h, sell16.h, sell8.h, sell4.h, panels128.h. Bitmap reads 32 bytes from each
//          position in the values: kSlack makes room behind the last one.
// Tails    outputs: partly stored; k: none is padded; rows: smaller instances.
// Bound    bitmap: 9 loads and 45 instructions per 32 slots: 5.6 cycles on Zen 5, 8 reached. sell16: 23 loads and 57
//          instructions per 16 non-zeros: 8 cycles, 12.5 reached (sell8: 13.6). sell4: 6 uops of two ports and 19
//          instructions per 16 slots: 3.3 cycles on Zen 4, 4.2 reached. panels: 4 FMAs, 4 3/4 loads
//          and a shuffle a non-zero and 32 rows.
// Measured docs/kernels/sparse_matmul.md
#include "../../runtime/simd/avx2.h"
#include "../../runtime/simd/transpose8_avx.inl"

namespace {

// For each byte of a mask the lane of vpermps that each set bit takes its value from; negative where a bit is not set.
struct SpreadTable {
  alignas(64) int32_t lane[256][8];
  constexpr SpreadTable() : lane() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int bit = 0; bit < 8; ++bit) lane[mask][bit] = (mask >> bit & 1) != 0 ? next++ : -1;
    }
  }
};
constexpr SpreadTable kSpread;

struct Lanes {  // two ymm
  __m256 a, b;
  static Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }
  static __m256 load8(const float* value) { return _mm256_loadu_ps(value); }
  static __m256 load8(const uint16_t* bf16) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  template <class T>
  static __m256 expand8(const T* value, uint32_t mask) {
    const __m256i lane = _mm256_load_si256(reinterpret_cast<const __m256i*>(kSpread.lane[mask]));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(load8(value), lane), _mm256_setzero_ps(),
                            _mm256_castsi256_ps(lane));
  }
  template <class T>
  static Lanes expand(const T* value, uint32_t mask) {
    return {expand8(value, mask & 0xff), expand8(value + __builtin_popcount(mask << 24), mask >> 8)};
  }
  static __m256 broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Lanes fma(const Lanes& w, __m256 x, const Lanes& s) {
    return {_mm256_fmadd_ps(w.a, x, s.a), _mm256_fmadd_ps(w.b, x, s.b)};
  }
};

// Four weights in one load; a shuffle broadcasts one of them, and the load units are left to x.
struct Four {
  using Value = float;
  static constexpr int kCount = 4;
  __m256 v;
  explicit Four(const float* p) : v(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))) {}
  template <int kLane>
  __m256 at() const {
    return _mm256_permute_ps(v, kLane * 0x55);
  }
};

// The same of bfloat16, widened by a shuffle.
struct FourBf16 {
  using Value = uint16_t;
  static constexpr int kCount = 4;
  __m256 v;
  explicit FourBf16(const uint16_t* p) {
    long long four;
    memcpy(&four, p, sizeof four);
    const __m256i high =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7));
    v = _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_set1_epi64x(four), high));
  }
  template <int kLane>
  __m256 at() const {
    return _mm256_permute_ps(v, kLane * 0x55);
  }
};

template <class Store>
inline void transpose_tile(const float* in, int64_t in_stride, const Store& store) {
  transpose8(in, in_stride, store);
}

// Four lanes of a sell format.
struct Quad {
  __m128 v;
  static Quad zero() { return {_mm_setzero_ps()}; }
  static Quad load(const float* p) { return {_mm_loadu_ps(p)}; }
  static Quad of_bf16(const uint16_t* p, bool high) {
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm_castsi128_ps(high ? _mm_and_si128(pairs, _mm_set1_epi32(static_cast<int>(0xffff0000)))
                                  : _mm_slli_epi32(pairs, 16))};
  }
  void store(float* p) const { _mm_storeu_ps(p, v); }
  static Quad of(const float* x, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return {_mm_setr_ps(x[a], x[b], x[c], x[d])};
  }
  static Quad fma(const Quad& w, const Quad& x, const Quad& s) { return {_mm_fmadd_ps(w.v, x.v, s.v)}; }
};

// Eight lanes of sell4.
struct Eight {
  __m256 v;
  static Eight zero() { return {_mm256_setzero_ps()}; }
  static Eight load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  static Eight fma(const Eight& w, const Eight& x, const Eight& s) { return {_mm256_fmadd_ps(w.v, x.v, s.v)}; }
};

struct Places {
  __m256i low, high;  // of the step: in bits 0 to 2, where vpermps looks, and in bit 31, where vblendvps does
  static Places load(const uint8_t* p) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {both, both};
  }
  // An addition, as shifts wait for the ports of the permutations.
  Places next() const { return {_mm256_srli_epi32(low, 3), _mm256_add_epi32(high, high)}; }
};

struct Window {
  __m256 low, high;
  explicit Window(const float* x) : low(_mm256_loadu_ps(x)), high(_mm256_loadu_ps(x + 8)) {}
  Eight pick(const Places& at) const {
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at.low), _mm256_permutevar8x32_ps(high, at.low),
                             _mm256_castsi256_ps(at.high))};
  }
};

}  // namespace

#include "kernels.inl"
#include "panels.inl"
#include "sell16.inl"
#include "sell4.inl"
#include "sell8.inl"
#include "slices_avx2.inl"
// Behind these two:
#include "blocks.inl"
#include "nm.inl"

namespace {

alignas(16) constexpr int32_t kFirst[8] = {-1, -1, -1, -1, 0, 0, 0, 0};  // from 4 - n on: the mask of n lanes

struct Dot {
  using F = __m256;
  using Half = __m256;
  using Four = __m128;
  static constexpr int kWidth = 8;
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // Per quarter of the 16 lanes: (lane 0 + lane 2) + (lane 1 + lane 3) of a, b, c, d.
  static Half fold(F a, F b, F c, F d) {
    const F ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const F cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256d ab_pd = _mm256_castps_pd(ab), cd_pd = _mm256_castps_pd(cd);
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab_pd, cd_pd)),
                         _mm256_castpd_ps(_mm256_unpackhi_pd(ab_pd, cd_pd)));
  }
  static Four sum(Half low, Half high) {
    const F two = _mm256_add_ps(low, high);
    return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
  }
  static __m128i first(int n) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(kFirst + 4 - n)); }
  static void store(float* p, Four v) { _mm_storeu_ps(p, v); }
  static void store(float* p, Four v, int n) { _mm_maskstore_ps(p, first(n), v); }
  static void add(float* p, Four v) { _mm_storeu_ps(p, _mm_add_ps(_mm_loadu_ps(p), v)); }
  static void add(float* p, Four v, int n) {
    _mm_maskstore_ps(p, first(n), _mm_add_ps(_mm_maskload_ps(p, first(n)), v));
  }
};

}  // namespace

#include "sddmm.inl"

namespace {

template <class T>
void bitmap_of(const FewArgs& a) {
  switch (a.rows) {
    case 1: return bitmap_rows<Lanes, 1, T>(a);
    case 2: return bitmap_rows<Lanes, 2, T>(a);
    case 3: return bitmap_halves<Lanes, 3, T>(a);
    default: return bitmap_halves<Lanes, 4, T>(a);
  }
}
void bitmap(const FewArgs& a) { bitmap_of<float>(a); }
void bitmap_bf16(const FewArgs& a) { bitmap_of<uint16_t>(a); }

template <int kVecs, int kRows>
void panels_of(const PanelArgs& a) {
  return a.pack.value16 == nullptr ? panel_lanes<kVecs, kRows, Four>(a) : panel_lanes<kVecs, kRows, FourBf16>(a);
}
void panels(const PanelArgs& a) {
  switch (a.lanes) {
    case 8: return panels_of<1, 8>(a);
    case 16: return panels_of<2, 4>(a);
    default: return panels_of<4, 2>(a);
  }
}

void block_panel(const TileArgs& a) {
  switch (a.lanes) {
    case 8: return block_panel_of<8>(a);
    case 16: return block_panel_of<16>(a);
    case 32: return block_panel_of<32>(a);
    default: return block_panel_of<64>(a);
  }
}

void nm_panel(const TileArgs& a) {
  switch (a.lanes) {
    case 8: return nm_panel_of<8>(a);
    case 16: return nm_panel_of<16>(a);
    case 32: return nm_panel_of<32>(a);
    default: return nm_panel_of<64>(a);
  }
}

}  // namespace

const Kernels fs::sparse_matmul::kAvx2 = {"avx2",
                                          fs::isa::Level::avx2,
                                          fs::isa::kLevelAvx2,
                                          &bitmap,
                                          &bitmap_bf16,
                                          &sell16,
                                          &sell8,
                                          &sell4,
                                          &panels,
                                          &transpose,
                                          &finish,
                                          &finish_columns,
                                          &sample_block,
                                          &activation_grad_block,
                                          &block_slices,
                                          &block_panel,
                                          &nm_slices,
                                          &nm_panel};
