// bitmap_s8 without vpexpandb: 16 bytes at a time by vpshufb, one body for what has SSE's bytes. The level brings,
// before this, `struct Few`:
//   kCodeBytes            bytes of a code of x
//   X, x(p)               4 codes of a row, for 4 outputs
//   Sum, zero(), dot(sum, w, x)   w: 4 outputs x 4 k of s8
//   finish(sum)           s32 of 4 outputs
// Bound    per 4 outputs x 4 k two loads of a table, two of values, two vpshufb and an unpack beside the products.
#include <immintrin.h>
#include <string.h>

#include "../int8.h"

namespace {

using namespace fs::sparse_matmul::int8;

// Where the bytes go whose bits are set: byte i of row m is the number of bits set in m below i, 128 (a zero) for an
// unset i.
struct Spread {
  uint8_t at[256][8];
};
constexpr Spread make_spread() {
  Spread s{};
  for (int mask = 0; mask < 256; ++mask) {
    uint8_t count = 0;
    for (int i = 0; i < 8; ++i) s.at[mask][i] = mask >> i & 1 ? count++ : uint8_t{128};
  }
  return s;
}
alignas(64) constexpr Spread kSpread = make_spread();

inline __m128i spread8(const int8_t* value, uint64_t mask) {
  return _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(value)),
                          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSpread.at[mask & 255])));
}

template <int kQuarter>
inline __m128i spread16(const int8_t* value, uint64_t mask) {  // outputs 4 * kQuarter .. + 3 of a tile
  constexpr int kShift = 16 * kQuarter;
  const int8_t* low = value + _mm_popcnt_u64(mask & ((uint64_t{1} << kShift) - 1));
  const int8_t* high = value + _mm_popcnt_u64(mask & ((uint64_t{1} << (kShift + 8)) - 1));
  return _mm_unpacklo_epi64(spread8(low, mask >> kShift), spread8(high, mask >> (kShift + 8)));
}

template <int kRows>
struct TileSums {
  TileSums<kRows - 1> above;
  Few::Sum a, b, c, d;
};
template <>
struct TileSums<0> {};

inline void clear(TileSums<0>&) {}
template <int kRows>
inline void clear(TileSums<kRows>& s) {
  clear(s.above);
  s.a = s.b = s.c = s.d = Few::zero();
}

inline void tile(TileSums<0>&, __m128i, __m128i, __m128i, __m128i, const uint8_t*, int64_t) {}
template <int kRows>
inline void tile(TileSums<kRows>& s, __m128i a, __m128i b, __m128i c, __m128i d, const uint8_t* x, int64_t x_stride) {
  tile(s.above, a, b, c, d, x, x_stride);
  const Few::X four = Few::x(x + (kRows - 1) * x_stride);
  s.a = Few::dot(s.a, a, four);
  s.b = Few::dot(s.b, b, four);
  s.c = Few::dot(s.c, c, four);
  s.d = Few::dot(s.d, d, four);
}

inline void put(int32_t* acc, __m128i sum, const int32_t* column_sum, __m128i offset) {
  const __m128i columns = _mm_loadu_si128(reinterpret_cast<const __m128i*>(column_sum));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(acc), _mm_sub_epi32(sum, _mm_mullo_epi32(columns, offset)));
}

inline void finish(const TileSums<0>&, int32_t*, const int32_t*, __m128i) {}
template <int kRows>
inline void finish(const TileSums<kRows>& s, int32_t* acc, const int32_t* column_sum, __m128i offset) {
  finish(s.above, acc, column_sum, offset);
  int32_t* row = acc + (kRows - 1) * fs::int8_gemm::kMaxTileColumns;
  put(row, Few::finish(s.a), column_sum, offset);
  put(row + 4, Few::finish(s.b), column_sum + 4, offset);
  put(row + 8, Few::finish(s.c), column_sum + 8, offset);
  put(row + 12, Few::finish(s.d), column_sum + 12, offset);
}

template <int kRows>
void bitmap_rows(const FewArgs& a) {
  const Bitmap& w = a.weight;
  const int64_t steps = w.steps();
  const int8_t* const last = w.value + w.total;
  for (int64_t p = 0; p < a.panels; ++p) {
    const int64_t panel = a.panel + p;
    const uint64_t* mask = w.mask + panel * steps;
    const auto total = static_cast<uint64_t>(w.total);
    const int8_t* value = w.value + (w.offset[panel] < total ? w.offset[panel] : total);
    TileSums<kRows> s;
    clear(s);
    for (int64_t i = 0; i < steps; ++i) {
      if (i % kClampTiles == 0 && __builtin_expect(value > last, 0)) value = last;
      _mm_prefetch(reinterpret_cast<const char*>(value + a.prefetch_ahead), _MM_HINT_T0);
      const uint64_t m = mask[i];
      tile(s, spread16<0>(value, m), spread16<1>(value, m), spread16<2>(value, m), spread16<3>(value, m),
           a.x + i * kTileK * Few::kCodeBytes, a.x_stride);
      value += _mm_popcnt_u64(m);
    }
    finish(s, a.acc + p * kTileOutputs, w.sum + panel * kTileOutputs, _mm_set1_epi32(a.offset));
  }
}

void bitmap(const FewArgs& a) { return a.rows == 1 ? bitmap_rows<1>(a) : bitmap_rows<2>(a); }

}  // namespace
