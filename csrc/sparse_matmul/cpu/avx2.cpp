// sparse_matmul, AVX2 (with FMA).
// Idea     bitmap: vpshufb spreads four values after a nibble of the mask and writes zeros between them: no vexpandps
//          needed, and where 256-bit operations are split in two (Zen 1), 128-bit ones cost nothing extra.
//          sell: the sixteen elements of x are put together from scalar loads (gathers are slow here).
//          panels: one broadcast weight meets 64 rows of x, 8 FMAs with memory operands.
// Tile     bitmap: 32 outputs x 1 row (8 xmm sums), x 2 or 3 rows (4 ymm sums a row). sell: 16 outputs x 1 to 3 rows.
//          panels: 1 output x 64 rows, 8 ymm sums.
// Reads    formats/sparse.h. Bitmap reads 16 bytes from each position in the values, kSlack makes room for the last.
// Tails    outputs: partly stored; k: none is padded; rows: smaller instances.
// Measured docs/kernels/sparse_matmul.md
#include "../../runtime/simd/avx2.h"
#include "../../runtime/simd/transpose8_avx.inl"

namespace {

// For each nibble the bytes of vpshufb: the i-th of four floats into the place of the i-th set bit, 0x80 (zero)
// elsewhere.
struct SpreadTable {
  alignas(64) uint8_t bytes[16][16];
  constexpr SpreadTable() : bytes() {
    for (int mask = 0; mask < 16; ++mask) {
      int from = 0;
      for (int lane = 0; lane < 4; ++lane) {
        const bool set = (mask >> lane & 1) != 0;
        for (int i = 0; i < 4; ++i)
          bytes[mask][4 * lane + i] = set ? static_cast<uint8_t>(4 * from + i) : uint8_t{0x80};
        from += set;
      }
    }
  }
};
constexpr SpreadTable kSpread;

inline __m128 spread(const float* value, uint32_t nibble_times_16) {
  const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(value));
  const auto* table = reinterpret_cast<const __m128i*>(&kSpread.bytes[0][0] + nibble_times_16);
  return _mm_castsi128_ps(_mm_shuffle_epi8(four, _mm_load_si128(table)));
}
inline int64_t bits(uint32_t mask) { return _mm_popcnt_u32(mask); }

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
  static Narrow expand(const float* value, uint32_t mask) {
    return {spread(value, (mask << 4) & 0xf0), spread(value + bits(mask & 0xf), mask & 0xf0),
            spread(value + bits(mask & 0xff), (mask >> 4) & 0xf0),
            spread(value + bits(mask & 0xfff), (mask >> 8) & 0xf0)};
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
    uint64_t q[4];
    Index(const uint8_t* p, uint16_t last) {
      const __m128i highest = _mm_set1_epi16(static_cast<int16_t>(last));
      const auto* k = reinterpret_cast<const __m128i*>(p);
      const __m128i low = _mm_min_epu16(_mm_loadu_si128(k), highest),
                    high = _mm_min_epu16(_mm_loadu_si128(k + 1), highest);
      q[0] = static_cast<uint64_t>(_mm_cvtsi128_si64(low));
      q[1] = static_cast<uint64_t>(_mm_extract_epi64(low, 1));
      q[2] = static_cast<uint64_t>(_mm_cvtsi128_si64(high));
      q[3] = static_cast<uint64_t>(_mm_extract_epi64(high, 1));
    }
    static __m128 four(const float* x, uint64_t k) {
      const __m128 first = _mm_load_ss(x + (k & 0xffff)), third = _mm_load_ss(x + (k >> 32 & 0xffff));
      const __m128 low = _mm_insert_ps(first, _mm_load_ss(x + (static_cast<uint32_t>(k) >> 16)), 0x10);
      return _mm_movelh_ps(low, _mm_insert_ps(third, _mm_load_ss(x + (k >> 48)), 0x10));
    }
    Narrow of(const float* x) const { return {four(x, q[0]), four(x, q[1]), four(x, q[2]), four(x, q[3])}; }
  };
};

struct Wide {  // two ymm
  __m256 a, b;
  static Wide zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }
  static Wide expand(const float* value, uint32_t mask) {
    const Narrow n = Narrow::expand(value, mask);
    return {_mm256_set_m128(n.b, n.a), _mm256_set_m128(n.d, n.c)};
  }
  static __m256 broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Wide fma(const Wide& w, __m256 x, const Wide& s) {
    return {_mm256_fmadd_ps(w.a, x, s.a), _mm256_fmadd_ps(w.b, x, s.b)};
  }
};

}  // namespace

#include "kernels.inl"

namespace {

void panel(const PanelArgs& a) {
  switch (a.lanes) {
    case 8: return panel_lanes<1>(a);
    case 16: return panel_lanes<2>(a);
    case 32: return panel_lanes<4>(a);
    default: return panel_lanes<8>(a);
  }
}

}  // namespace

const Kernels fs::sparse_matmul::kAvx2 = {
    "avx2", fs::isa::Level::avx2, fs::isa::kLevelAvx2, &bitmap, &sell, &panel, &transpose, &finish};
