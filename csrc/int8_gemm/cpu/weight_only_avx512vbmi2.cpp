// weight_only_linear with a bitmap_u4 pack, AVX-512-VNNI with VBMI2 (Ice Lake, Zen 4 and later).
// Idea     a byte holds a weight of two tiles of 16 columns x 4 k: in its low nibble one of k..k+3, in its high nibble
//          one of k+4..k+7. So one load serves both, and nothing is unpacked: vpexpandb by the one mask and by the
//          other, and vpternlog takes the nibble and makes of two's complement (and of the zero where nothing is
//          stored) what u4 has, w + 8, of the high nibble 16 times as much. From there on as with u4.
// Tile     1 to 4 rows x 16 columns, low and high sums of each, of one row two sets; float32 sums of the groups beside
//          them in registers.
// Bound    per 16 columns x 8 k for one row: a load, 2 kmov, 2 vpexpandb, 2 vpternlog, 2 vpdpbusd; from DRAM the bytes.
// Reads    64 bytes from the position in the codes, behind them there is room (formats/bitmap_u4.h).
// Measured docs/kernels/sparse_matmul.md
#include <immintrin.h>
#include <string.h>

#include "../weight_only.h"

// As in weight_only_avx512.inl: inlined before gcc takes structs apart, but not under sanitizers.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_UNDEFINED__)
#define WO_INLINE inline
#else
#define WO_INLINE __attribute__((always_inline)) inline
#endif

namespace {

using namespace fs::int8_gemm;

constexpr int64_t kColumns = 16;    // of a panel
constexpr int64_t kCellK = 8;       // k of a cell
constexpr int64_t kClampCells = 4;  // cells between two looks at the position; of a group there are 4, 8 or 16
constexpr int kAndXor = 0x6a;       // vpternlog: (a & b) ^ c
constexpr int kEither = 0xca;       // a ? b : c

template <int kRows>
struct Sums {
  Sums<kRows - 1> above;
  __m512i low, high;
};
template <>
struct Sums<0> {};

template <int kRows>
struct Floats {
  Floats<kRows - 1> above;
  __m512 v;
};
template <>
struct Floats<0> {};

WO_INLINE void clear(Floats<0>&) {}
template <int kRows>
WO_INLINE void clear(Floats<kRows>& f) {
  clear(f.above);
  f.v = _mm512_setzero_ps();
}

// Of each row what the codes are too large by, times the sum of its x, negative.
WO_INLINE void start(Sums<0>&, const int32_t*) {}
template <int kRows>
WO_INLINE void start(Sums<kRows>& s, const int32_t* x_sum) {
  start(s.above, x_sum);
  s.low = _mm512_set1_epi32(-8 * x_sum[kRows - 1]);
  s.high = _mm512_setzero_si512();
}

WO_INLINE __m512i broadcast4(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

WO_INLINE void dot(Sums<0>&, __m512i, __m512i, const int8_t*) {}
template <int kRows>
WO_INLINE void dot(Sums<kRows>& s, __m512i low_u8, __m512i high_u8, const int8_t* x) {
  dot(s.above, low_u8, high_u8, x);
  s.low = _mm512_dpbusd_epi32(s.low, low_u8, broadcast4(x + (kRows - 1) * kBlockK));
  s.high = _mm512_dpbusd_epi32(s.high, high_u8, broadcast4(x + (kRows - 1) * kBlockK + 4));
  asm("" : "+v"(s.low), "+v"(s.high));  // in their place
}

// In place, in assembly: on Zen 5 vpexpandb waits for what its target held before
// (sparse_matmul/cpu/int8_avx512vbmi2.cpp).
WO_INLINE __m512i expand(__m512i codes, uint64_t mask) {
  asm("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(codes) : "Yk"(mask));
  return codes;
}

template <int kRows>
WO_INLINE void cell(Sums<kRows>& s, const uint8_t* code, const uint64_t* mask, const int8_t* x) {
  __m512i codes = _mm512_loadu_si512(code);
  asm("" : "+v"(codes));  // loaded once, as it crosses a line most of the time; gcc 12 reads memory twice
  const __m512i low =
      _mm512_ternarylogic_epi32(expand(codes, mask[0]), _mm512_set1_epi8(0x0f), _mm512_set1_epi8(0x08), kAndXor);
  const __m512i high =
      _mm512_ternarylogic_epi32(expand(codes, mask[1]), _mm512_set1_epi8(-16), _mm512_set1_epi8(-128), kAndXor);
  dot(s, low, high, x);
}

inline int64_t bytes_of(const uint64_t* mask) {
  const int64_t low = __builtin_popcountll(mask[0]), high = __builtin_popcountll(mask[1]);
  return low > high ? low : high;
}

template <int kRows>
WO_INLINE void add(Sums<kRows>& s, const Sums<kRows>& other) {
  s.low = _mm512_add_epi32(s.low, other.low);
  s.high = _mm512_add_epi32(s.high, other.high);
}

WO_INLINE void add_group(Floats<0>&, const Sums<0>&, const float*, __m512) {}
template <int kRows>
WO_INLINE void add_group(Floats<kRows>& f, const Sums<kRows>& s, const float* x_scale, __m512 scale) {
  add_group(f.above, s.above, x_scale, scale);
  const __m512i sum = _mm512_add_epi32(s.low, _mm512_srai_epi32(s.high, 4));
  const __m512 both = _mm512_mul_ps(_mm512_set1_ps(x_scale[kRows - 1]), scale);
  f.v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, f.v);
}

WO_INLINE void store(const Floats<0>&, float*) {}
template <int kRows>
WO_INLINE void store(const Floats<kRows>& f, float* acc) {
  store(f.above, acc);
  _mm512_storeu_ps(acc + (kRows - 1) * kWeightOnlyColumns, f.v);
}

template <int kRows, bool kFar>
void tile_panel(const GroupTileArgs& t, const BitmapU4& w, int64_t panel, float* acc) {
  const uint64_t* mask = w.mask + panel * w.cells() * 2;
  const uint16_t* scale = w.scale + panel * t.groups * kColumns;
  const uint8_t* code = w.code + w.begin(panel);
  const uint8_t* const last = w.code + w.total;
  const int8_t* x_block = t.x;
  int64_t in_block = 0;
  Floats<kRows> sums;
  clear(sums);
  for (int64_t g = 0; g < t.groups; ++g, scale += kColumns) {
    Sums<kRows> first;
    start(first, t.x_sum + g * t.group_stride);
    Sums<1> second;  // of one row: four chains, or the latency of vpdpbusd is what bounds it
    second.low = second.high = _mm512_setzero_si512();
    const int8_t* x = x_block + in_block;
    const int8_t* const end = x + t.group;
    do {
      if (__builtin_expect(code > last, 0)) code = last;
      if constexpr (kFar) {
        _mm_prefetch(reinterpret_cast<const char*>(code + t.prefetch_ahead), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(code + t.prefetch_ahead + 64), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(mask) + t.prefetch_ahead / 2, _MM_HINT_T0);
      }
      const int64_t bytes0 = bytes_of(mask), bytes01 = bytes0 + bytes_of(mask + 2);
      const int64_t bytes2 = bytes_of(mask + 4), bytes23 = bytes2 + bytes_of(mask + 6);
      cell(first, code, mask, x);
      if constexpr (kRows == 1)
        cell(second, code + bytes0, mask + 2, x + kCellK);
      else
        cell(first, code + bytes0, mask + 2, x + kCellK);
      cell(first, code + bytes01, mask + 4, x + 2 * kCellK);
      if constexpr (kRows == 1)
        cell(second, code + (bytes01 + bytes2), mask + 6, x + 3 * kCellK);
      else
        cell(first, code + (bytes01 + bytes2), mask + 6, x + 3 * kCellK);
      code += bytes01 + bytes23;
      mask += kClampCells * 2;
      x += kClampCells * kCellK;
    } while (x != end);
    if constexpr (kRows == 1) add(first, second);
    add_group(sums, first, t.x_scale + g * t.group_stride,
              _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scale))));
    in_block += t.group;
    if (in_block == kBlockK) {
      in_block = 0;
      x_block += t.block_stride;
    }
  }
  store(sums, acc);
}

template <int kRows>
void tile_rows(const GroupTileArgs& t, const BitmapU4& w, int64_t panel) {
  for (int64_t i = 0; i < t.columns / kColumns; ++i) {
    float* acc = t.acc + i * kColumns;
    t.prefetch_ahead > 0 ? tile_panel<kRows, true>(t, w, panel + i, acc)
                         : tile_panel<kRows, false>(t, w, panel + i, acc);
  }
}

void tile(const GroupTileArgs& t, const BitmapU4& w, int64_t panel) {
  switch (t.rows) {
    case 1: return tile_rows<1>(t, w, panel);
    case 2: return tile_rows<2>(t, w, panel);
    case 3: return tile_rows<3>(t, w, panel);
    default: return tile_rows<4>(t, w, panel);
  }
}

void cells(const BitmapU4& w, int64_t panel, int64_t prefetch_ahead, uint8_t* out) {
  const int64_t count = w.cells();
  const uint64_t* mask = w.mask + panel * count * 2;
  const uint8_t* code = w.code + w.begin(panel);
  const uint8_t* const last = w.code + w.total;
  for (int64_t c = 0; c < count; c += kClampCells) {
    if (__builtin_expect(code > last, 0)) code = last;
    _mm_prefetch(reinterpret_cast<const char*>(mask) + prefetch_ahead / 2, _MM_HINT_T0);
    for (int64_t i = 0; i < kClampCells; ++i, mask += 2, out += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(code + prefetch_ahead), _MM_HINT_T0);
      __m512i codes = _mm512_loadu_si512(code);
      asm("" : "+v"(codes));
      const __m512i both =
          _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x0f), expand(codes, mask[0]), expand(codes, mask[1]), kEither);
      _mm512_storeu_si512(out, _mm512_xor_si512(both, _mm512_set1_epi8(-0x78)));  // 0x88
      code += bytes_of(mask);
      asm("" : "+r"(code));  // gcc 12 would go through vector registers
    }
  }
}

}  // namespace

const BitmapKernels fs::int8_gemm::kBitmapAvx512Vbmi2 = {4, &tile, &cells};
