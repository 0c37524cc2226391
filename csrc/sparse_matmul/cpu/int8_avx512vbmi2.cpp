// sparse_int8_linear, AVX-512-VNNI with VBMI2 (Ice Lake, Zen 4 and later).
// windows  a step of 32 outputs x 4 weights: vpermb picks their x from 64 codes, vpdpbusd multiplies them.
// bitmap   a tile of 16 outputs x 4 k: vpexpandb puts its stored bytes where vpdpbusd wants them.
// Tile     bitmap: up to 4 rows x 16 outputs, two sets of sums, of one row four. windows: up to 8 rows x 32 outputs.
// Bound    windows: 2 vpermb and 2 vpdpbusd a row and step, of one row the bytes, 256 a step. bitmap: per tile kmov,
//          vpexpandb and vpdpbusd take 3 of Intel's port 5 for one row; from DRAM the bytes.
// Reads    bitmap: 64 bytes from the position in the values, behind them there is room (formats/bitmap_s8.h).
// Measured docs/kernels/sparse_matmul.md
#include "int8_lanes_avx512.inl"
//
#include "int8_blocks.inl"
#include "int8_columns_avx512.inl"

namespace {

template <int kRows>
struct TileSums {
  TileSums<kRows - 1> above;
  __m512i v;
};
template <>
struct TileSums<0> {};

inline void fill(TileSums<0>&, __m512i) {}
template <int kRows>
inline void fill(TileSums<kRows>& s, __m512i v) {
  fill(s.above, v);
  s.v = v;
}

inline void tile(TileSums<0>&, __m512i, const uint8_t*, int64_t) {}
template <int kRows>
inline void tile(TileSums<kRows>& s, __m512i w, const uint8_t* x, int64_t x_stride) {
  tile(s.above, w, x, x_stride);
  int32_t four;
  memcpy(&four, x + (kRows - 1) * x_stride, 4);
  s.v = _mm512_dpbusd_epi32(s.v, _mm512_set1_epi32(four), w);
  asm("" : "+v"(s.v));
}

inline void add(TileSums<0>&, const TileSums<0>&) {}
template <int kRows>
inline void add(TileSums<kRows>& s, const TileSums<kRows>& other) {
  add(s.above, other.above);
  s.v = _mm512_add_epi32(s.v, other.v);
}

inline void finish(const TileSums<0>&, int32_t*) {}
template <int kRows>
inline void finish(const TileSums<kRows>& s, int32_t* acc) {
  finish(s.above, acc);
  _mm512_storeu_si512(acc + (kRows - 1) * fs::int8_gemm::kMaxTileColumns, s.v);
}

// In place, in assembly: on Zen 5 vpexpandb waits for what its target held before, with a zeroing mask, too, so that a
// loop which expands into one register takes 5 cycles a tile. And a load of its own is faster there than the operand.
inline __m512i expand(const int8_t* value, uint64_t mask) {
  __m512i w = _mm512_loadu_si512(value);
  asm("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(w) : "Yk"(mask));
  return w;
}

template <int kRows, bool kFar>
void bitmap_rows(const FewArgs& a) {
  const Bitmap& w = a.weight;
  const int64_t steps = w.steps();
  const int8_t* const last = w.value + w.total;
  for (int64_t p = 0; p < a.panels; ++p) {
    const int64_t panel = a.panel + p;
    const uint64_t* mask = w.mask + panel * steps;
    const auto total = static_cast<uint64_t>(w.total);
    const int8_t* value = w.value + (w.offset[panel] < total ? w.offset[panel] : total);
    TileSums<kRows> first, second, third, fourth;
    fill(first, _mm512_mullo_epi32(_mm512_loadu_si512(w.sum + panel * kTileOutputs), _mm512_set1_epi32(-a.offset)));
    fill(second, _mm512_setzero_si512());
    fill(third, _mm512_setzero_si512());
    fill(fourth, _mm512_setzero_si512());
    const uint8_t* x = a.x;
    int64_t left = steps;
    for (; left >= kClampTiles; left -= kClampTiles, mask += kClampTiles, x += kClampTiles * kTileK) {
      if (__builtin_expect(value > last, 0)) value = last;
      if constexpr (kFar) {
        _mm_prefetch(reinterpret_cast<const char*>(value + a.prefetch_ahead), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(value + a.prefetch_ahead + 64), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(mask) + a.prefetch_ahead / 4, _MM_HINT_T0);
      }
      const int64_t count0 = __builtin_popcountll(mask[0]), count1 = __builtin_popcountll(mask[1]);
      const int64_t count2 = __builtin_popcountll(mask[2]), count3 = __builtin_popcountll(mask[3]);
      const int64_t count01 = count0 + count1;
      const int8_t* v1 = value + count0;
      const int8_t* v2 = value + count01;
      const int8_t* v3 = value + (count01 + count2);
      // One row: four chains, or the latency of vpdpbusd is what bounds it.
      TileSums<kRows>& even = kRows == 1 ? third : first;
      TileSums<kRows>& odd = kRows == 1 ? fourth : second;
      tile(first, expand(value, mask[0]), x, a.x_stride);
      tile(second, expand(v1, mask[1]), x + kTileK, a.x_stride);
      tile(even, expand(v2, mask[2]), x + 2 * kTileK, a.x_stride);
      tile(odd, expand(v3, mask[3]), x + 3 * kTileK, a.x_stride);
      value += count01 + (count2 + count3);
    }
    if (__builtin_expect(value > last, 0)) value = last;
    for (; left > 0; --left, ++mask, x += kTileK) {
      tile(first, expand(value, *mask), x, a.x_stride);
      value += __builtin_popcountll(*mask);
    }
    add(first, second);
    if constexpr (kRows == 1) {
      add(third, fourth);
      add(first, third);
    }
    finish(first, a.acc + p * kTileOutputs);
  }
}

template <int kRows>
void bitmap_of(const FewArgs& a) {
  return a.prefetch_ahead > 0 ? bitmap_rows<kRows, true>(a) : bitmap_rows<kRows, false>(a);
}

void bitmap(const FewArgs& a) {
  switch (a.rows) {
    case 1: return bitmap_of<1>(a);
    case 2: return bitmap_of<2>(a);
    case 3: return bitmap_of<3>(a);
    default: return bitmap_of<4>(a);
  }
}

// windows: each of 64 places picks its x from a register of 64 codes. kRows x 2 sums; of one row two sets, even and odd
// steps.
template <int kRows>
struct SlicePair {
  SlicePair<kRows - 1> above;
  __m512i low, high;
};
template <>
struct SlicePair<0> {};

inline void fill(SlicePair<0>&, __m512i, __m512i) {}
template <int kRows>
inline void fill(SlicePair<kRows>& s, __m512i low, __m512i high) {
  fill(s.above, low, high);
  s.low = low;
  s.high = high;
}

struct Places {
  __m512i low_index, high_index, low, high;
};
inline Places places(const uint8_t* step) {
  return {_mm512_loadu_si512(step), _mm512_loadu_si512(step + 64), _mm512_loadu_si512(step + 128),
          _mm512_loadu_si512(step + 192)};
}

// Several rows use the places: they are loaded once, too.
inline void hold(Places& p) { asm("" : "+v"(p.low_index), "+v"(p.high_index), "+v"(p.low), "+v"(p.high)); }

inline void window(SlicePair<0>&, const Places&, const uint8_t*, int64_t) {}
template <int kRows>
inline void window(SlicePair<kRows>& s, const Places& p, const uint8_t* x, int64_t x_stride) {
  window(s.above, p, x, x_stride);
  __m512i codes = _mm512_loadu_si512(x + (kRows - 1) * x_stride);
  asm("" : "+v"(codes));  // loaded once, as it crosses a line most of the time; gcc 12 would read memory twice
  s.low = _mm512_dpbusd_epi32(s.low, _mm512_permutexvar_epi8(p.low_index, codes), p.low);
  s.high = _mm512_dpbusd_epi32(s.high, _mm512_permutexvar_epi8(p.high_index, codes), p.high);
}

inline void finish(const SlicePair<0>&, int32_t*) {}
template <int kRows>
inline void finish(const SlicePair<kRows>& s, int32_t* acc) {
  finish(s.above, acc);
  _mm512_storeu_si512(acc + (kRows - 1) * fs::int8_gemm::kMaxTileColumns, s.low);
  _mm512_storeu_si512(acc + (kRows - 1) * fs::int8_gemm::kMaxTileColumns + 16, s.high);
}

template <int kRows>
void windows_rows(const WindowArgs& a) {
  const Windows& w = a.weight;
  const __m512i offset = _mm512_set1_epi32(-a.offset);
  for (int64_t i = 0; i < a.slices; ++i) {
    const int32_t* sum = w.sum + (a.slice + i) * kWindowOutputs;
    SlicePair<kRows> s;
    fill(s, _mm512_mullo_epi32(_mm512_loadu_si512(sum), offset),
         _mm512_mullo_epi32(_mm512_loadu_si512(sum + 16), offset));
    const uint16_t* base = w.base + w.begin(a.slice + i);
    const uint16_t* const end = w.base + w.end(a.slice + i);
    const uint8_t* step = w.step + w.begin(a.slice + i) * kStepBytes;
    if constexpr (kRows == 1) {
      SlicePair<1> odd;
      fill(odd, _mm512_setzero_si512(), _mm512_setzero_si512());
      for (; end - base >= 2; base += 2, step += 2 * kStepBytes) {
        window(s, places(step), a.x + base[0] * kTileK, 0);
        window(odd, places(step + kStepBytes), a.x + base[1] * kTileK, 0);
      }
      s.low = _mm512_add_epi32(s.low, odd.low);
      s.high = _mm512_add_epi32(s.high, odd.high);
    }
    for (; base < end; ++base, step += kStepBytes) {
      Places p = places(step);
      if constexpr (kRows > 1) hold(p);
      window(s, p, a.x + *base * kTileK, a.x_stride);
    }
    finish(s, a.acc + i * kWindowOutputs);
  }
}

void windows(const WindowArgs& a) {
  switch (a.rows) {
    case 1: return windows_rows<1>(a);
    case 2: return windows_rows<2>(a);
    case 3: return windows_rows<3>(a);
    case 4: return windows_rows<4>(a);
    case 5: return windows_rows<5>(a);
    case 6: return windows_rows<6>(a);
    case 7: return windows_rows<7>(a);
    default: return windows_rows<8>(a);
  }
}

}  // namespace

const Kernels fs::sparse_matmul::int8::kAvx512Vbmi2 = {"avx512vbmi2",
                                                       fs::isa::Level::avx512,
                                                       fs::isa::kLevelAvx512 | fs::isa::kAvx512Vbmi2,
                                                       &fs::int8_gemm::kAvx512,
                                                       &fs::sparse_matmul::kAvx512,
                                                       4,
                                                       Lanes::kWidth,
                                                       &bitmap,
                                                       &windows,
                                                       &blocks,
                                                       &finish_columns};
