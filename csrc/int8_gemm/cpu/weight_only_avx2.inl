// weight_only_linear, AVX2 and AVX-VNNI. Included by the level's file, whose nested structs hold the sums.
// Idea     u4: the low and the high nibbles of 32 bytes are 4 k each of 8 columns, the unsigned operand. AVX2:
//          vpmaddubsw cannot saturate on them (15 * 127 * 2), and eight of its results, 32 k, still fit s16; then one
//          vpmaddwd by 1. AVX-VNNI: vpdpbusd. s8: AVX2 widens both sides to s16 (vpmaddwd), AVX-VNNI reads w ^ 0x80 =
//          w + 128. What the codes are too large by is taken off beforehand: sums start at -8 (or -zero point, or
//          -128) times the sum of the group's x.
// Tile     1 row x 16 columns, 2, 3 rows x 8, each sum with its float32 beside it: more would spill.
// Measured docs/kernels/int8_gemm.md
#include "weight_only.inl"

namespace {

constexpr int kWeightOnlyRows = 3;
#if defined(__AVXVNNI__)
constexpr bool kHasVnni = true;
#else
constexpr bool kHasVnni = false;
#endif

inline __m256i load256(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i four_k(const int8_t* x) {  // for 8 columns
  int32_t four;
  memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}
inline __m256i add32(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }

// Vecs<kRows>: one vector a row, of 8 columns. Half<kHalves, kRows>: that for each 8 columns of a panel.
template <int kHalves, int kRows>
struct Halves {
  Halves<kHalves - 1, kRows> rest;
  Vecs<kRows> rows;
};
template <int kRows>
struct Halves<0, kRows> {};

template <int kRows>
inline void clear(Halves<0, kRows>&) {}
template <int kHalves, int kRows>
inline void clear(Halves<kHalves, kRows>& h) {
  clear(h.rest);
  clear(h.rows);
}

// u8 * s8 into sums of s32 (AVX-VNNI) or s16 (AVX2, at most eight times).
inline void dot(Vecs<0>&, __m256i, const int8_t*) {}
template <int kRows>
inline void dot(Vecs<kRows>& s, __m256i w_u8, const int8_t* x) {
  dot(s.rest, w_u8, x);
  const __m256i x_s8 = four_k(x + (kRows - 1) * kBlockK);
#if defined(__AVXVNNI__)
  s.v = _mm256_dpbusd_avx_epi32(s.v, w_u8, x_s8);
#else
  s.v = _mm256_add_epi16(s.v, _mm256_maddubs_epi16(w_u8, x_s8));
#endif
}

inline void add_pairs(Vecs<0>&, const Vecs<0>&) {}
template <int kRows>
inline void add_pairs(Vecs<kRows>& s, const Vecs<kRows>& s16) {
  add_pairs(s.rest, s16.rest);
  s.v = add32(s.v, _mm256_madd_epi16(s16.v, _mm256_set1_epi16(1)));
}

struct U4 {
  static constexpr int64_t kBytes = 64;  // of 8 k

  template <int kRows>
  static void cell(Vecs<kRows>& s, const uint8_t* w, const int8_t* x) {
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i codes = load256(w);
    dot(s, _mm256_and_si256(codes, low), x);
    dot(s, _mm256_and_si256(_mm256_srli_epi16(codes, 4), low), x + 4);
  }

  static __m256i start(const GroupTileArgs& t, int64_t column, int64_t g, int32_t x_sum) {
    if (t.zero == nullptr) return _mm256_set1_epi32(-8 * x_sum);
    const uint8_t* p = t.zero + g * 8;
    const __m256i two = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i points = column == 0 ? _mm256_and_si256(two, _mm256_set1_epi32(15)) : _mm256_srli_epi32(two, 4);
    // |x_sum| <= 128 * 127: a product of 16 bits, beside one with 0
    return _mm256_madd_epi16(points, _mm256_set1_epi32(-x_sum));
  }

  static __m256 scale(const GroupTileArgs& t, int64_t column, int64_t g) {
    const uint16_t* p = t.scale + g * kPanelColumns + column;
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};

struct S8 {
  static constexpr int64_t kBytes = 128;

  // 4 k
  template <int kRows>
  static void half_cell(Vecs<kRows>& s, const uint8_t* w, const int8_t* x) {
    dot(s, _mm256_xor_si256(load256(w), _mm256_set1_epi8(-128)), x);
  }
  template <int kRows>
  static void cell(Vecs<kRows>& s, const uint8_t* w, const int8_t* x) {
    half_cell(s, w, x);
    half_cell(s, w + 64, x + 4);
  }

  static __m256i start(const GroupTileArgs&, int64_t, int64_t, int32_t x_sum) {
    return _mm256_set1_epi32(kHasVnni ? -128 * x_sum : 0);
  }

  static __m256 scale(const GroupTileArgs& t, int64_t column, int64_t) { return _mm256_loadu_ps(t.scale_f32 + column); }
};

template <class Format>
inline void start_rows(Vecs<0>&, const GroupTileArgs&, int64_t, int64_t, const int32_t*) {}
template <class Format, int kRows>
inline void start_rows(Vecs<kRows>& s, const GroupTileArgs& t, int64_t column, int64_t g, const int32_t* x_sum) {
  start_rows<Format>(s.rest, t, column, g, x_sum);
  s.v = Format::start(t, column, g, x_sum[kRows - 1]);
}
template <class Format, int kRows>
inline void start_group(Halves<0, kRows>&, const GroupTileArgs&, int64_t, int64_t, const int32_t*) {}
template <class Format, int kHalves, int kRows>
inline void start_group(Halves<kHalves, kRows>& s, const GroupTileArgs& t, int64_t column, int64_t g,
                        const int32_t* x_sum) {
  start_group<Format>(s.rest, t, column, g, x_sum);
  start_rows<Format>(s.rows, t, column + 8 * (kHalves - 1), g, x_sum);
}

template <class Format, int kRows>
inline void cells(Halves<0, kRows>&, const uint8_t*, const int8_t*) {}
template <class Format, int kHalves, int kRows>
inline void cells(Halves<kHalves, kRows>& s, const uint8_t* w, const int8_t* x) {
  cells<Format>(s.rest, w, x);
  Format::cell(s.rows, w + 32 * (kHalves - 1), x);
}

template <int kRows>
inline void add_pairs(Halves<0, kRows>&, const Halves<0, kRows>&) {}
template <int kHalves, int kRows>
inline void add_pairs(Halves<kHalves, kRows>& s, const Halves<kHalves, kRows>& s16) {
  add_pairs(s.rest, s16.rest);
  add_pairs(s.rows, s16.rows);
}

inline void add_rows(Vecs<0>&, const Vecs<0>&, __m256, const float*) {}
template <int kRows>
inline void add_rows(Vecs<kRows>& acc, const Vecs<kRows>& sum, __m256 scale, const float* x_scale) {
  add_rows(acc.rest, sum.rest, scale, x_scale);
  const __m256 both = _mm256_mul_ps(_mm256_set1_ps(x_scale[kRows - 1]), scale);
  acc.v = _mm256_castps_si256(_mm256_fmadd_ps(_mm256_cvtepi32_ps(sum.v), both, _mm256_castsi256_ps(acc.v)));
}
template <class Format, int kRows>
inline void add_group(Halves<0, kRows>&, const Halves<0, kRows>&, const GroupTileArgs&, int64_t, int64_t,
                      const float*) {}
template <class Format, int kHalves, int kRows>
inline void add_group(Halves<kHalves, kRows>& acc, const Halves<kHalves, kRows>& sum, const GroupTileArgs& t,
                      int64_t column, int64_t g, const float* x_scale) {
  add_group<Format>(acc.rest, sum.rest, t, column, g, x_scale);
  add_rows(acc.rows, sum.rows, Format::scale(t, column + 8 * (kHalves - 1), g), x_scale);
}

inline void store_rows(const Vecs<0>&, float*) {}
template <int kRows>
inline void store_rows(const Vecs<kRows>& acc, float* out) {
  store_rows(acc.rest, out);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (kRows - 1) * kWeightOnlyColumns), acc.v);
}
template <int kRows>
inline void store_halves(const Halves<0, kRows>&, float*) {}
template <int kHalves, int kRows>
inline void store_halves(const Halves<kHalves, kRows>& acc, float* out) {
  store_halves(acc.rest, out);
  store_rows(acc.rows, out + 8 * (kHalves - 1));
}

// One group of u4: blocks of 32 k.
template <int kHalves, int kRows>
inline void multiply_u4(Halves<kHalves, kRows>& sum, const uint8_t* w, const int8_t* x, int64_t depth, int64_t ahead) {
  for (const int8_t* end = x + depth; x != end; w += 4 * U4::kBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(w + ahead), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(w + ahead + 64), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(w + ahead + 128), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(w + ahead + 192), _MM_HINT_T0);
    Halves<kHalves, kRows> s16;
    if constexpr (!kHasVnni) clear(s16);
    for (int i = 0; i < 4; ++i, x += 8) cells<U4>(kHasVnni ? sum : s16, w + i * U4::kBytes, x);
    if constexpr (!kHasVnni) add_pairs(sum, s16);
  }
}

template <int kHalves, int kRows>
void tile_u4_of(const GroupTileArgs& t, int64_t column) {
  Halves<kHalves, kRows> acc, sum;
  clear(acc);
  for (int64_t g = 0; g < t.groups; ++g) {
    start_group<U4>(sum, t, column, g, t.x_sum + g * t.group_stride);
    const int64_t k = g * t.group;
    multiply_u4(sum, t.weight + k * 8 + column * 4, t.x + k / kBlockK * t.block_stride + k % kBlockK, t.group,
                t.prefetch_ahead);
    add_group<U4>(acc, sum, t, column, g, t.x_scale + g * t.group_stride);
  }
  store_halves(acc, t.acc + column);
}

#if defined(__AVXVNNI__)
template <int kRows>
inline void half_cells(Halves<0, kRows>&, const uint8_t*, const int8_t*) {}
template <int kHalves, int kRows>
inline void half_cells(Halves<kHalves, kRows>& s, const uint8_t* w, const int8_t* x) {
  half_cells(s.rest, w, x);
  S8::half_cell(s.rows, w + 32 * (kHalves - 1), x);
}

template <int kHalves, int kRows>
inline void multiply_s8(Halves<kHalves, kRows>& sum, const uint8_t* w, const int8_t* x, int64_t depth, int64_t ahead) {
  for (const int8_t* end = x + depth; x != end; x += kStepK, w += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(w + ahead), _MM_HINT_T0);
    half_cells(sum, w, x);
  }
}
#else
// 8 columns x 4 k as two vectors of s16: sums of pairs of k, of 4 columns each.
inline void dot_wide(Vecs<0>&, Vecs<0>&, __m256i, __m256i, const int8_t*) {}
template <int kRows>
inline void dot_wide(Vecs<kRows>& left, Vecs<kRows>& right, __m256i w_left, __m256i w_right, const int8_t* x) {
  dot_wide(left.rest, right.rest, w_left, w_right, x);
  int32_t four;
  memcpy(&four, x + (kRows - 1) * kBlockK, 4);
  const __m256i x_s16 = _mm256_cvtepi8_epi16(_mm_set1_epi32(four));
  left.v = add32(left.v, _mm256_madd_epi16(x_s16, w_left));
  right.v = add32(right.v, _mm256_madd_epi16(x_s16, w_right));
}
inline void join(Vecs<0>&, const Vecs<0>&, const Vecs<0>&) {}
template <int kRows>
inline void join(Vecs<kRows>& sum, const Vecs<kRows>& left, const Vecs<kRows>& right) {
  join(sum.rest, left.rest, right.rest);
  sum.v = _mm256_permute4x64_epi64(_mm256_hadd_epi32(left.v, right.v), 0xd8);
}

template <int kRows>
inline void multiply_s8(Halves<0, kRows>&, const uint8_t*, const int8_t*, int64_t, int64_t) {}
template <int kHalves, int kRows>
inline void multiply_s8(Halves<kHalves, kRows>& sum, const uint8_t* w, const int8_t* x, int64_t depth, int64_t ahead) {
  multiply_s8(sum.rest, w, x, depth, ahead);
  Vecs<kRows> left, right;
  clear(left);
  clear(right);
  const uint8_t* from = w + 32 * (kHalves - 1);
  for (const int8_t* end = x + depth; x != end; x += kStepK, from += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(from + ahead), _MM_HINT_T0);
    const auto* s8 = reinterpret_cast<const __m128i*>(from);
    dot_wide(left, right, _mm256_cvtepi8_epi16(_mm_loadu_si128(s8)), _mm256_cvtepi8_epi16(_mm_loadu_si128(s8 + 1)), x);
  }
  join(sum.rows, left, right);
}
#endif

template <int kHalves, int kRows>
void tile_s8_of(const GroupTileArgs& t, int64_t column) {
  Halves<kHalves, kRows> acc, sum;
  clear(acc);
  for (int64_t g = 0; g < t.groups; ++g) {
    start_group<S8>(sum, t, column, g, t.x_sum + g * t.group_stride);
    const int64_t left = t.k_steps * kStepK - g * t.group;
    multiply_s8(sum, t.weight + g * t.group * kPanelColumns + column * 4, t.x + g * t.block_stride,
                left < t.group ? left : t.group, t.prefetch_ahead);
    add_group<S8>(acc, sum, t, column, g, t.x_scale + g * t.group_stride);
  }
  store_halves(acc, t.acc + column);
}

template <void (*kPanel)(const GroupTileArgs&, int64_t), int kHalves>
void for_each_panel(const GroupTileArgs& t, bool u4) {
  GroupTileArgs part = t;
  for (int64_t n = 0; n < t.columns; n += kPanelColumns) {
    for (int64_t column = 0; column < kPanelColumns; column += 8 * kHalves) kPanel(part, column);
    part.weight += t.panel_stride;
    part.acc += kPanelColumns;
    if (u4) {
      part.scale += t.scale_stride;
      if (t.zero != nullptr) part.zero += t.zero_stride;
    } else {
      part.scale_f32 += kPanelColumns;
    }
  }
}

void tile_u4(const GroupTileArgs& t) {
  switch (t.rows) {
    case 1: return for_each_panel<&tile_u4_of<2, 1>, 2>(t, true);
    case 2: return for_each_panel<&tile_u4_of<1, 2>, 1>(t, true);
    default: return for_each_panel<&tile_u4_of<1, 3>, 1>(t, true);
  }
}

void tile_s8(const GroupTileArgs& t) {
  switch (t.rows) {
    case 1: return for_each_panel<&tile_s8_of<2, 1>, 2>(t, false);
    case 2: return for_each_panel<&tile_s8_of<1, 2>, 1>(t, false);
    default: return for_each_panel<&tile_s8_of<1, 3>, 1>(t, false);
  }
}

constexpr WeightOnlyKernels weight_only = {kWeightOnlyRows, &quantize_groups, &tile_u4, &tile_s8, &finish};

}  // namespace
