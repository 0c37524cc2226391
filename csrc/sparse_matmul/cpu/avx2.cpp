// sparse_matmul, AVX2 (with FMA).
// Idea     bitmap: vpshufb spreads four values after a nibble of the mask and writes zeros between them: no vexpandps
//          needed, and where 256-bit operations are split in two (Zen 1), 128-bit ones cost nothing extra.
//          sell: the sixteen elements of x are put together from scalar loads (gathers are slow here).
//          panels: one broadcast weight meets up to 32 rows of x, 4 FMAs with memory operands.
// Tile     bitmap: 32 outputs x 1 row (8 xmm sums) or 2 (4 ymm sums a row), 16 outputs x 3 or 4 rows. sell: 16 outputs
// x
//          1 to 4 rows. panels: 8 ymm sums: 2 outputs x 32 rows, 4 x 16 or 8 x 8.
// Reads    formats/bitmap32.h, sell16.h, panels128.h. Bitmap reads 16 bytes from each position in the values and 16 up
// to it: kSlack makes room
//          behind the last one, the sections of the pack before the first.
// Tails    outputs: partly stored; k: none is padded; rows: smaller instances.
// Bound    bitmap: 19 loads per 32 slots, 3 of them twice because they cross 32 bytes: 11 cycles, 13 reached. sell: 23
// loads
//          and 57 instructions per 16 non-zeros: 13 cycles, 14.5 reached. panels: 4 FMAs, 4 3/4 loads
//          and a shuffle a non-zero and 32 rows.
// Measured docs/kernels/sparse_matmul.md
#include "../../runtime/simd/avx2.h"
#include "../../runtime/simd/transpose8_avx.inl"

namespace {

// For each byte of a mask two times the bytes of vpshufb, 0x80 (zero) where a bit is not set. The low four bits take
// the first of the byte's values, from a vector that begins with them; the high four take the last ones, from a vector
// that ends with them: so neither needs to know how many bits the other has.
struct SpreadTable {
  alignas(64) uint8_t bytes[256][2][16];
  constexpr SpreadTable() : bytes() {
    for (int mask = 0; mask < 256; ++mask) {
      int high_bits = 0;
      for (int bit = 4; bit < 8; ++bit) high_bits += mask >> bit & 1;
      int from[2] = {0, 4 - high_bits};
      for (int bit = 0; bit < 8; ++bit) {
        const bool set = (mask >> bit & 1) != 0;
        int& next = from[bit / 4];
        for (int i = 0; i < 4; ++i)
          bytes[mask][bit / 4][bit % 4 * 4 + i] = set ? static_cast<uint8_t>(4 * next + i) : uint8_t{0x80};
        next += set;
      }
    }
  }
};
constexpr SpreadTable kSpread;

inline __m128 spread(const float* value, const uint8_t* bytes) {
  const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(value));
  return _mm_castsi128_ps(_mm_shuffle_epi8(four, _mm_load_si128(reinterpret_cast<const __m128i*>(bytes))));
}
struct Narrow {  // four xmm
  __m128 a, b, c, d;
  static Narrow zero() { return {_mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps()}; }
  static Narrow load(const float* p) {
    return {_mm_loadu_ps(p), _mm_loadu_ps(p + 4), _mm_loadu_ps(p + 8), _mm_loadu_ps(p + 12)};
  }
  void store(float* p) const {
    _mm_storeu_ps(p, a);
    _mm_storeu_ps(p + 4, b);
    _mm_storeu_ps(p + 8, c);
    _mm_storeu_ps(p + 12, d);
  }
  static Narrow expand(const float* value, const float* end, uint32_t mask) {
    const auto &first = kSpread.bytes[mask & 0xff], &second = kSpread.bytes[mask >> 8];
    const float* const middle = value + _mm_popcnt_u32(mask & 0xff);
    return {spread(value, first[0]), spread(middle - 4, first[1]), spread(middle, second[0]),
            spread(end - 4, second[1])};
  }
  static __m128 broadcast(const float* p) { return _mm_broadcast_ss(p); }
  static Narrow fma(const Narrow& w, __m128 x, const Narrow& s) {
    return {_mm_fmadd_ps(w.a, x, s.a), _mm_fmadd_ps(w.b, x, s.b), _mm_fmadd_ps(w.c, x, s.c), _mm_fmadd_ps(w.d, x, s.d)};
  }
  static Narrow multiply_add(const Narrow& w, const Narrow& x, const Narrow& s) {
    return {_mm_fmadd_ps(w.a, x.a, s.a), _mm_fmadd_ps(w.b, x.b, s.b), _mm_fmadd_ps(w.c, x.c, s.c),
            _mm_fmadd_ps(w.d, x.d, s.d)};
  }

  struct Index {  // sixteen u16, four to a register
    uint64_t a, b, c, d;
    explicit Index(const uint8_t* p) : a(load8(p)), b(load8(p + 8)), c(load8(p + 16)), d(load8(p + 24)) {}
    static uint64_t load8(const uint8_t* p) {
      uint64_t q;
      memcpy(&q, p, sizeof q);
      return q;
    }
    static __m128 four(const float* x, uint64_t k) {
      const auto low = static_cast<uint32_t>(k), high = static_cast<uint32_t>(k >> 32);
      return _mm_setr_ps(x[low & 0xffff], x[low >> 16], x[high & 0xffff], x[high >> 16]);
    }
    Narrow of(const float* x) const { return {four(x, a), four(x, b), four(x, c), four(x, d)}; }
  };
};

struct Wide {  // two ymm
  __m256 a, b;
  static Wide zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }
  static Wide expand(const float* value, const float* end, uint32_t mask) {
    const Narrow n = Narrow::expand(value, end, mask);
    return {_mm256_set_m128(n.b, n.a), _mm256_set_m128(n.d, n.c)};
  }
  static __m256 broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Wide fma(const Wide& w, __m256 x, const Wide& s) {
    return {_mm256_fmadd_ps(w.a, x, s.a), _mm256_fmadd_ps(w.b, x, s.b)};
  }
};

// Four weights in one load; a shuffle broadcasts one of them, and the load units are left to x.
struct Four {
  __m256 v;
  explicit Four(const float* p) : v(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))) {}
  template <int kLane>
  __m256 at() const {
    return _mm256_permute_ps(v, kLane * 0x55);
  }
};

}  // namespace

#include "kernels.inl"
#include "panels.inl"
#include "slices_avx2.inl"
// Behind these two:
#include "blocks.inl"
#include "nm.inl"

namespace {

void bitmap(const FewArgs& a) {
  switch (a.rows) {
    case 1: return bitmap_rows<Narrow, 1>(a);
    case 2: return bitmap_rows<Wide, 2>(a);
    case 3: return bitmap_halves<Wide, 3>(a);
    default: return bitmap_halves<Wide, 4>(a);
  }
}

void panels(const PanelArgs& a) {
  switch (a.lanes) {
    case 8: return panel_lanes<1, 8>(a);
    case 16: return panel_lanes<2, 4>(a);
    default: return panel_lanes<4, 2>(a);
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

const Kernels fs::sparse_matmul::kAvx2 = {
    "avx2",  fs::isa::Level::avx2, fs::isa::kLevelAvx2, &bitmap,    &sell,    &panels, &transpose,
    &finish, &block_slices,        &block_panel,        &nm_slices, &nm_panel};
