// weight_only_linear, AVX-512-VNNI. Included by avx512.cpp, whose nested structs hold the sums.
// Idea     the codes of the weight are the unsigned operand of vpdpbusd, those of x the signed one. u4: a 64-byte load
// is
//          8 k of 16 columns; its low nibbles meet k..k+3, its high nibbles k+4..k+7. With one or two rows the high
//          nibbles stay where they are, worth 16 times as much, and have sums of their own, which a shift at the
//          group's end brings back: two ANDs for 128 weights. s8: w ^ 0x80 is w + 128.
//          What the codes are too large by is taken off beforehand: sums start at -8 (or -zero point, or -128) times
//          the sum of the group's x.
// Tile     1, 2 rows x 64 columns: two sets of sums, the float32 sums of the groups beside them in registers.
//          3 to 6 rows x 64, 7 to 12 rows x 32: one set, float32 sums in memory, which the end of a group adds to.
//          1 row of u4, where t.stream says so: a single stream, four sets of sums, each cell loaded once.
// Prefetch from L3 and DRAM, in each of the (four) column streams (prefetcht0), none where the weights lie in L2.
// Measured docs/kernels/int8_gemm.md
#include "weight_only.inl"

// The steps of a tile must be inlined before gcc takes structs apart, or sums go through the stack. Not under
// sanitizers, where that takes it minutes.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_UNDEFINED__)
#define WO_INLINE inline
#else
#define WO_INLINE __attribute__((always_inline)) inline
#endif

namespace {

constexpr int kWeightOnlyRows = 12;
constexpr int64_t kStride = 128;  // bytes of one step of a column stream: two cells

WO_INLINE void prefetch_step(Vecs<0>, const uint8_t*, int64_t) {}
template <int kPanels>
WO_INLINE void prefetch_step(Vecs<kPanels>, const uint8_t* w, int64_t panel_stride) {
  prefetch_step(Vecs<kPanels - 1>(), w, panel_stride);
  const uint8_t* p = w + (kPanels - 1) * panel_stride;
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(p + 64), _MM_HINT_T0);
}

WO_INLINE __m512i broadcast4(const int8_t* x) { return broadcast4(reinterpret_cast<const uint8_t*>(x)); }

// One row over all column panels; the codes are the unsigned operand.
WO_INLINE void dot(Vecs<0>&, const Vecs<0>&, __m512i) {}
template <int kPanels>
WO_INLINE void dot(Vecs<kPanels>& s, const Vecs<kPanels>& w_u8, __m512i x_s8) {
  dot(s.rest, w_u8.rest, x_s8);
  __m512i sum = _mm512_dpbusd_epi32(s.v, w_u8.v, x_s8);
  asm("" : "+v"(sum));  // in its place: gcc 12 copies each sum to and fro in the loop
  s.v = sum;
}

// All rows, 4 k.
template <int kPanels>
WO_INLINE void dot_rows(Sums<0, kPanels>&, const Vecs<kPanels>&, const int8_t*) {}
template <int kRows, int kPanels>
WO_INLINE void dot_rows(Sums<kRows, kPanels>& s, const Vecs<kPanels>& w_u8, const int8_t* x) {
  dot_rows(s.above, w_u8, x);
  dot(s.row, w_u8, broadcast4(x + (kRows - 1) * kBlockK));
}

// kLow: the low nibbles. kHigh: the high ones, shifted down. kHigh16: where they are, 16 times as much. kS8: w + 128.
enum class Codes { kLow, kHigh, kHigh16, kS8 };

template <Codes kCodes>
WO_INLINE void codes_of(Vecs<0>&, const uint8_t*, int64_t) {}
template <Codes kCodes, int kPanels>
WO_INLINE void codes_of(Vecs<kPanels>& w_u8, const uint8_t* w, int64_t panel_stride) {
  codes_of<kCodes>(w_u8.rest, w, panel_stride);
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i cell = _mm512_loadu_si512(w + (kPanels - 1) * panel_stride);
  if constexpr (kCodes == Codes::kLow) w_u8.v = _mm512_and_si512(cell, low);
  if constexpr (kCodes == Codes::kHigh) w_u8.v = _mm512_and_si512(_mm512_srli_epi16(cell, 4), low);
  if constexpr (kCodes == Codes::kHigh16) w_u8.v = _mm512_andnot_si512(low, cell);
  if constexpr (kCodes == Codes::kS8) w_u8.v = _mm512_xor_si512(cell, _mm512_set1_epi8(-128));
}

template <Codes kCodes, int kRows, int kPanels>
WO_INLINE void multiply(Sums<kRows, kPanels>& s, const uint8_t* w, int64_t panel_stride, const int8_t* x) {
  Vecs<kPanels> w_u8;
  codes_of<kCodes>(w_u8, w, panel_stride);
  dot_rows(s, w_u8, x);
}

struct U4 {
  static constexpr bool kS8 = false;
  static constexpr int64_t kDepth = 16;  // k of one step
  static constexpr int kShift = 4;       // of the second set

  static int64_t full_groups(const GroupTileArgs& t) { return t.groups; }

  template <bool kTwoSets, int kRows, int kPanels>
  WO_INLINE static void cell(Sums<kRows, kPanels>& first, Sums<kRows, kPanels>& second, const uint8_t* w,
                             int64_t panel_stride, const int8_t* x) {
    multiply<Codes::kLow>(first, w, panel_stride, x);
    if constexpr (kTwoSets)
      multiply<Codes::kHigh16>(second, w, panel_stride, x + 4);
    else
      multiply<Codes::kHigh>(first, w, panel_stride, x + 4);
  }

  template <bool kTwoSets, int kRows, int kPanels>
  WO_INLINE static void step(Sums<kRows, kPanels>& first, Sums<kRows, kPanels>& second, const uint8_t* w,
                             int64_t panel_stride, const int8_t* x) {
    cell<kTwoSets>(first, second, w, panel_stride, x);
    cell<kTwoSets>(first, second, w + 64, panel_stride, x + 8);
  }

  // What the codes are too large by, times the sum of x, negative.
  static __m512i start(const GroupTileArgs& t, int64_t panel, int64_t g, int32_t x_sum) {
    if (t.zero == nullptr) return _mm512_set1_epi32(-8 * x_sum);
    const __m128i two = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(t.zero + panel * t.zero_stride + g * 8));
    const __m128i low = _mm_set1_epi8(15);
    const __m128i points = _mm_unpacklo_epi64(_mm_and_si128(two, low), _mm_and_si128(_mm_srli_epi16(two, 4), low));
    // |x_sum| <= 128 * 127: a product of 16 bits, beside one with 0
    return _mm512_madd_epi16(_mm512_cvtepu8_epi32(points), _mm512_set1_epi32(-x_sum));
  }

  static __m512 scale(const GroupTileArgs& t, int64_t panel, int64_t g) {
    const uint16_t* p = t.scale + panel * t.scale_stride + g * kPanelColumns;
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
};

struct S8 {
  static constexpr bool kS8 = true;
  static constexpr int64_t kDepth = 8;
  static constexpr int kShift = 0;

  static int64_t full_groups(const GroupTileArgs& t) { return t.k_steps * kStepK / kGroupS8; }

  template <bool kTwoSets, int kRows, int kPanels>
  WO_INLINE static void step(Sums<kRows, kPanels>& first, Sums<kRows, kPanels>& second, const uint8_t* w,
                             int64_t panel_stride, const int8_t* x) {
    multiply<Codes::kS8>(first, w, panel_stride, x);
    if constexpr (kTwoSets)
      multiply<Codes::kS8>(second, w + 64, panel_stride, x + 4);
    else
      multiply<Codes::kS8>(first, w + 64, panel_stride, x + 4);
  }

  static __m512i start(const GroupTileArgs&, int64_t, int64_t, int32_t x_sum) {
    return _mm512_set1_epi32(-128 * x_sum);
  }

  static __m512 scale(const GroupTileArgs& t, int64_t panel, int64_t) {
    return _mm512_loadu_ps(t.scale_f32 + panel * kPanelColumns);
  }
};

template <class Format>
WO_INLINE void start_row(Vecs<0>&, const GroupTileArgs&, int64_t, int32_t) {}
template <class Format, int kPanels>
WO_INLINE void start_row(Vecs<kPanels>& s, const GroupTileArgs& t, int64_t g, int32_t x_sum) {
  start_row<Format>(s.rest, t, g, x_sum);
  s.v = Format::start(t, kPanels - 1, g, x_sum);
}
template <class Format, int kPanels>
WO_INLINE void start_group(Sums<0, kPanels>&, const GroupTileArgs&, int64_t, const int32_t*) {}
template <class Format, int kRows, int kPanels>
WO_INLINE void start_group(Sums<kRows, kPanels>& s, const GroupTileArgs& t, int64_t g, const int32_t* x_sum) {
  start_group<Format>(s.above, t, g, x_sum);
  start_row<Format>(s.row, t, g, x_sum[kRows - 1]);
}

// float32 sums: in acc with one and two rows, else at out.
template <class Format, bool kTwoSets, bool kInRegisters>
WO_INLINE void add_row(Vecs<0>&, const Vecs<0>&, const Vecs<0>&, const GroupTileArgs&, int64_t, __m512, float*) {}
template <class Format, bool kTwoSets, bool kInRegisters, int kPanels>
WO_INLINE void add_row(Vecs<kPanels>& acc, const Vecs<kPanels>& first, const Vecs<kPanels>& second,
                       const GroupTileArgs& t, int64_t g, __m512 x_scale, float* out) {
  add_row<Format, kTwoSets, kInRegisters>(acc.rest, first.rest, second.rest, t, g, x_scale, out);
  __m512i sum = first.v;
  if constexpr (kTwoSets) sum = _mm512_add_epi32(sum, _mm512_srai_epi32(second.v, Format::kShift));
  const __m512 scale = _mm512_mul_ps(x_scale, Format::scale(t, kPanels - 1, g));
  if constexpr (kInRegisters) {
    acc.v = _mm512_castps_si512(_mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_castsi512_ps(acc.v)));
  } else {
    float* p = out + (kPanels - 1) * kPanelColumns;
    _mm512_storeu_ps(p, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_loadu_ps(p)));
  }
}
template <class Format, bool kTwoSets, bool kInRegisters, int kPanels>
WO_INLINE void add_group(Sums<0, kPanels>&, const Sums<0, kPanels>&, const Sums<0, kPanels>&, const GroupTileArgs&,
                         int64_t) {}
template <class Format, bool kTwoSets, bool kInRegisters, int kRows, int kPanels>
WO_INLINE void add_group(Sums<kRows, kPanels>& acc, const Sums<kRows, kPanels>& first,
                         const Sums<kRows, kPanels>& second, const GroupTileArgs& t, int64_t g) {
  add_group<Format, kTwoSets, kInRegisters>(acc.above, first.above, second.above, t, g);
  const __m512 x_scale = _mm512_set1_ps(t.x_scale[g * t.group_stride + kRows - 1]);
  add_row<Format, kTwoSets, kInRegisters>(acc.row, first.row, second.row, t, g, x_scale,
                                          t.acc + (kRows - 1) * kWeightOnlyColumns);
}

template <int kPanels>
WO_INLINE void store_sums(const Sums<0, kPanels>&, float*) {}
template <int kRows, int kPanels>
WO_INLINE void store_sums(const Sums<kRows, kPanels>& acc, float* out) {
  store_sums(acc.above, out);
  store(acc.row, reinterpret_cast<int32_t*>(out + (kRows - 1) * kWeightOnlyColumns));  // floats in integer registers
}

template <class Format, int kRows, int kPanels, bool kTwoSets>
void tile_panels(const GroupTileArgs& t) {
  constexpr bool kInRegisters = kRows == 1;
  Sums<kRows, kPanels> acc, first, second;
  clear(acc);
  if constexpr (!kInRegisters) store_sums(acc, t.acc);
  const uint8_t* w = t.weight;
  const int8_t* x_block = t.x;
  int64_t in_block = 0;
  // What lies ahead of a column stream's end is another panel's beginning: there, the next tile's is wanted.
  const bool pages = t.prefetch_pages > 0;
  // More rows take so long over a step that lines asked for one by one come in time, too.
  const int64_t far = pages && (kRows <= 2 || Format::kS8) ? 0 : t.prefetch_ahead;
  const uint8_t* turn = t.weight + t.panel_stride - (pages ? t.prefetch_pages * kPageBytes : far);
  const int64_t group_bytes = t.group / Format::kDepth * kStride;
  const int64_t full = Format::full_groups(t);
  for (int64_t g = 0; g < full; ++g) {
    start_group<Format>(first, t, g, t.x_sum + g * t.group_stride);
    if constexpr (kTwoSets) clear(second);
    const int64_t ahead = far + (w < turn ? 0 : (kPanels - 1) * t.panel_stride);
    if (pages && begins_page(w, group_bytes))
      prefetch_pages(Vecs<kPanels>(), w + ahead, t.panel_stride, t.prefetch_pages);
    const int8_t* x = x_block + in_block;
    const int8_t* end = x + t.group;
    do {
      if (far > 0) {
        prefetch_step(Vecs<kPanels>(), w + ahead, t.panel_stride);
      }
      Format::template step<kTwoSets>(first, second, w, t.panel_stride, x);
      w += kStride;
      x += Format::kDepth;
    } while (x != end);
    add_group<Format, kTwoSets, kInRegisters>(acc, first, second, t, g);
    in_block += t.group;
    if (in_block == kBlockK) {
      in_block = 0;
      x_block += t.block_stride;
    }
  }
  if (Format::kS8 && full < t.groups) {  // the weight ends where K, rounded up to 4, does
    start_group<Format>(first, t, full, t.x_sum + full * t.group_stride);
    for (int64_t step = full * kBlockK / kStepK; step < t.k_steps; ++step, w += 64, x_block += kStepK)
      multiply<Codes::kS8>(first, w, t.panel_stride, x_block);
    add_group<Format, false, kInRegisters>(acc, first, second, t, full);
  }
  if constexpr (kInRegisters) store_sums(acc, t.acc);
}

// sum + w * the 4 k at x. By mnemonic: gcc 12 makes an instruction of its own of each broadcast.
WO_INLINE __m512i dot_broadcast(__m512i sum, __m512i w_u8, const int8_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w_u8), "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
  return sum;
}

constexpr int64_t kScaleAhead = 1024;  // bytes: with 512 the same, with 4096 slower from L3

// One row and column panel of u4; kCells: 8 k each, of a group. The next column panel begins where this one ends, so
// panel after panel is one stream of codes, and one of scales.
template <int kCells, bool kPrefetch>
void stream_panel(const GroupTileArgs& t) {
  const __m512i low = _mm512_set1_epi8(15);
  const uint8_t* w = t.weight;
  const int8_t* x_block = t.x;
  int64_t in_block = 0;
  __m512 acc = _mm512_setzero_ps();
  for (int64_t g = 0; g < t.groups; ++g) {
    const int8_t* x = x_block + in_block;
    if constexpr (kPrefetch)
      _mm_prefetch(reinterpret_cast<const char*>(t.scale + g * kPanelColumns) + kScaleAhead, _MM_HINT_T0);
    __m512i even = U4::start(t, 0, g, t.x_sum[g * t.group_stride]), odd = _mm512_setzero_si512();
    __m512i even16 = odd, odd16 = odd;  // of high nibbles
#pragma GCC unroll 8
    for (int i = 0; i < kCells; i += 2) {
      if constexpr (kPrefetch) {
        _mm_prefetch(reinterpret_cast<const char*>(w + t.prefetch_ahead + 64 * i), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(w + t.prefetch_ahead + 64 * i + 64), _MM_HINT_T0);
      }
      __m512i cell0 = _mm512_loadu_si512(w + 64 * i), cell1 = _mm512_loadu_si512(w + 64 * i + 64);
      asm("" : "+v"(cell0), "+v"(cell1));  // else gcc 12 loads each twice
      even = dot_broadcast(even, _mm512_and_si512(cell0, low), x + 8 * i);
      even16 = dot_broadcast(even16, _mm512_andnot_si512(low, cell0), x + 8 * i + 4);
      odd = dot_broadcast(odd, _mm512_and_si512(cell1, low), x + 8 * i + 8);
      odd16 = dot_broadcast(odd16, _mm512_andnot_si512(low, cell1), x + 8 * i + 12);
    }
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(even16, odd16), U4::kShift);
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(even, odd), high);
    const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(t.x_scale[g * t.group_stride]), U4::scale(t, 0, g));
    acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc);
    w += kCells * 64;
    in_block += t.group;
    if (in_block == kBlockK) {
      in_block = 0;
      x_block += t.block_stride;
    }
  }
  _mm512_storeu_ps(t.acc, acc);
}

template <int kCells>
void stream_panel(const GroupTileArgs& t) {
  if (t.prefetch_ahead > 0) return stream_panel<kCells, true>(t);
  stream_panel<kCells, false>(t);
}

void stream_panel(const GroupTileArgs& t) {
  if (t.group == 32) return stream_panel<4>(t);
  if (t.group == 64) return stream_panel<8>(t);
  stream_panel<16>(t);
}

// kPanels column panels at a time, then one by one.
template <class Format, int kRows, int kPanels, bool kTwoSets>
void tile_rows(const GroupTileArgs& t) {
  GroupTileArgs part = t;
  const auto skip = [&](int64_t panels) {
    part.weight += panels * t.panel_stride;
    if (Format::kS8) {
      part.scale_f32 += panels * kPanelColumns;
    } else {
      part.scale += panels * t.scale_stride;
      if (t.zero != nullptr) part.zero += panels * t.zero_stride;
    }
    part.acc += panels * kPanelColumns;
    part.columns -= panels * kPanelColumns;
  };
  if (!Format::kS8 && kRows == 1 && t.stream)
    for (; part.columns > 0; skip(1)) stream_panel(part);
  for (; part.columns >= kPanels * kPanelColumns; skip(kPanels)) tile_panels<Format, kRows, kPanels, kTwoSets>(part);
  for (; part.columns > 0; skip(1)) tile_panels<Format, kRows, 1, kTwoSets>(part);
}

template <class Format>
void tile_as(const GroupTileArgs& t) {
  switch (t.rows) {
    case 1: return tile_rows<Format, 1, 4, true>(t);
    case 2: return tile_rows<Format, 2, 4, true>(t);
    case 3: return tile_rows<Format, 3, 4, false>(t);
    case 4: return tile_rows<Format, 4, 4, false>(t);
    case 5: return tile_rows<Format, 5, 4, false>(t);
    case 6: return tile_rows<Format, 6, 4, false>(t);
    case 7: return tile_rows<Format, 7, 2, false>(t);
    case 8: return tile_rows<Format, 8, 2, false>(t);
    case 9: return tile_rows<Format, 9, 2, false>(t);
    case 10: return tile_rows<Format, 10, 2, false>(t);
    case 11: return tile_rows<Format, 11, 2, false>(t);
    default: return tile_rows<Format, 12, 2, false>(t);
  }
}

void tile_u4(const GroupTileArgs& t) { tile_as<U4>(t); }
void tile_s8(const GroupTileArgs& t) { tile_as<S8>(t); }

constexpr WeightOnlyKernels weight_only = {kWeightOnlyRows, &quantize_groups, &tile_u4, &tile_s8, &finish};

}  // namespace
