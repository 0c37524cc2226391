// int8_gemm, AVX-VNNI (vpdpbusd on ymm in VEX encoding; client cores without AVX-512): exact, -128 included.
// Idea     as the avx512 row: x is stored as x_q + 128, and the sums start at -128 * column_sum.
// Tile     up to 6 rows x 16 columns: 12 sums + 2 weights + 1 broadcast = 15 of 16 registers.
//          Few rows (up to 4): 48 columns, three weight streams; 1 row keeps two sets of sums (even and odd steps), 3
//          and 4 rows go through the streams in two halves. So there are 9 to 12 sums wherever there can be: vpdpbusd
//          takes 5 cycles and two begin in each.
// Reads    vnni16: two 32-byte loads per 16 columns x 4 k; x by vpbroadcastd, 4 k of one row.
// Tails    n: the caller copies only its columns; k: weights are zero-padded; m: smaller instances.
// Bound    per 4 k of 6 x 16: 12 vpdpbusd on two ports = 6 cycles, 8 loads = 4 cycles: compute, once the weights are in
//          L2. One row: the read bandwidth of the level the weights lie in.
// Prefetch as the avx512 row: the next column panel to L2 under the current one; few rows from L3 or DRAM 1 KB ahead.
// Measured docs/kernels/int8_gemm.md
#include "../../runtime/simd/avx2.h"

namespace {

struct Panel {
  static constexpr int kBytes = 1;
  static constexpr int kOffset = 128;
  static __m256i flip(__m256i s8) { return _mm256_xor_si256(s8, _mm256_set1_epi8(-128)); }  // s8 -> s8 + 128 as u8
  static void store4(uint8_t* p, __m256i q0, __m256i q1, __m256i q2, __m256i q3) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), flip(Simd::pack_s8(q0, q1, q2, q3)));
  }
  static void store4(uint8_t* p, const int8_t* a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), flip(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a))));
  }
};

}  // namespace

#include "elementwise.inl"
#include "pack_avx.inl"

namespace {

constexpr int kRows = 6;
constexpr int kFewRows = 4;
constexpr int kFewColumns = 48;
constexpr int kVecColumns = 8;
constexpr int64_t kBlockSteps = kBlockBytes / kStepK;
constexpr int64_t kStepBytes = kPanelColumns * kStepK;  // of weights, per column panel

// Vector v of a step of the weights: half v % 2 of column panel v / 2.
inline const int8_t* at(const int8_t* w, int64_t panel_stride, int v) { return w + v / 2 * panel_stride + v % 2 * 32; }

// Registers are named through nested structs, one level a row and one a vector: gcc 12 spills an array of them.
template <int kVecs>
struct Vecs {
  Vecs<kVecs - 1> rest;
  __m256i v;
};
template <>
struct Vecs<0> {};

inline __m256i load(const int8_t* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }

template <int kFirst>
inline void load(Vecs<0>&, const int8_t*, int64_t) {}
template <int kFirst, int kVecs>
inline void load(Vecs<kVecs>& b, const int8_t* w, int64_t panel_stride) {
  load<kFirst>(b.rest, w, panel_stride);
  b.v = load(at(w, panel_stride, kFirst + kVecs - 1));
}

inline void start(Vecs<0>&, const int32_t*, __m256i) {}
template <int kVecs>
inline void start(Vecs<kVecs>& s, const int32_t* column_sum, __m256i offset) {
  start(s.rest, column_sum, offset);
  s.v = _mm256_mullo_epi32(Simd::load_s32(column_sum + kVecColumns * (kVecs - 1)), offset);
}

inline void clear(Vecs<0>&) {}
template <int kVecs>
inline void clear(Vecs<kVecs>& s) {
  clear(s.rest);
  s.v = _mm256_setzero_si256();
}

inline void multiply_add(Vecs<0>&, const Vecs<0>&, __m256i) {}
template <int kVecs>
inline void multiply_add(Vecs<kVecs>& s, const Vecs<kVecs>& b, __m256i a) {
  multiply_add(s.rest, b.rest, a);
  s.v = _mm256_dpbusd_avx_epi32(s.v, a, b.v);
}

inline void store(const Vecs<0>&, int32_t*) {}
template <int kVecs>
inline void store(const Vecs<kVecs>& s, int32_t* acc) {
  store(s.rest, acc);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + kVecColumns * (kVecs - 1)), s.v);
}

inline void add(Vecs<0>&, const Vecs<0>&) {}
template <int kVecs>
inline void add(Vecs<kVecs>& s, const Vecs<kVecs>& other) {
  add(s.rest, other.rest);
  s.v = _mm256_add_epi32(s.v, other.v);
}

// kCount rows of sums.
template <int kCount, int kVecs>
struct Sums {
  Sums<kCount - 1, kVecs> above;
  Vecs<kVecs> row;
};
template <int kVecs>
struct Sums<0, kVecs> {};

template <int kVecs>
inline void start(Sums<0, kVecs>&, const int32_t*, __m256i) {}
template <int kCount, int kVecs>
inline void start(Sums<kCount, kVecs>& s, const int32_t* column_sum, __m256i offset) {
  start(s.above, column_sum, offset);
  start(s.row, column_sum, offset);
}

inline __m256i broadcast4(const uint8_t* a) {  // 4 k of one row, for 8 columns
  int32_t four;
  memcpy(&four, a, 4);
  return _mm256_set1_epi32(four);
}

// The weights of a step in registers, a row of x after the other.
template <int kVecs>
inline void step(Sums<0, kVecs>&, const Vecs<kVecs>&, const uint8_t*) {}
template <int kCount, int kVecs>
inline void step(Sums<kCount, kVecs>& s, const Vecs<kVecs>& b, const uint8_t* a) {
  step(s.above, b, a);
  multiply_add(s.row, b, broadcast4(a + (kCount - 1) * kRowStride));
}

template <int kVecs>
inline void store(const Sums<0, kVecs>&, int32_t*) {}
template <int kCount, int kVecs>
inline void store(const Sums<kCount, kVecs>& s, int32_t* acc) {
  store(s.above, acc);
  store(s.row, acc + (kCount - 1) * kMaxTileColumns);
}

// Rows against vectors [kFirst, kFirst + kVecs) of the call's columns. `ahead` > 0: so many bytes of `next` come to L2
// a step.
template <int kCount, int kFirst, int kVecs>
void tile_of(const TileArgs& t, const int8_t* next, int64_t ahead) {
  const int8_t* w = t.weight;
  Sums<kCount, kVecs> sums;
  start(sums, t.column_sum + kFirst * kVecColumns, _mm256_set1_epi32(-t.offset));
  const uint8_t* block = t.panel;
  for (int64_t left = t.k_steps; left > 0; left -= kBlockSteps, block += t.block_stride) {
    const uint8_t* a = block;
    const uint8_t* end = a + kStepK * (left < kBlockSteps ? left : kBlockSteps);
    for (; a != end; a += kStepK, w += kStepBytes) {
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
      next += ahead;
      Vecs<kVecs> b;
      load<kFirst>(b, w, t.panel_stride);
      step(sums, b, a);
    }
  }
  store(sums, t.acc + kFirst * kVecColumns);
}

// The lines that hold the vectors [kFirst, kFirst + kVecs) of a step.
template <int kFirst, int kVecs>
inline void prefetch(const int8_t* w, int64_t panel_stride) {
  for (int panel = kFirst / 2; panel <= (kFirst + kVecs - 1) / 2; ++panel)
    _mm_prefetch(reinterpret_cast<const char*>(w + panel * panel_stride), _MM_HINT_T0);
}

// One or two rows: x in registers, a vector of the weights after the other. kTwoSets: even and odd steps.
template <int kVecs>
inline void step_of_one(Vecs<kVecs>& s, const int8_t* w, int64_t panel_stride, __m256i a) {
  if constexpr (kVecs > 1) step_of_one(s.rest, w, panel_stride, a);
  s.v = _mm256_dpbusd_avx_epi32(s.v, a, load(at(w, panel_stride, kVecs - 1)));
}
template <int kVecs>
inline void step_of_two(Vecs<kVecs>& s0, Vecs<kVecs>& s1, const int8_t* w, int64_t panel_stride, __m256i a0,
                        __m256i a1) {
  if constexpr (kVecs > 1) step_of_two(s0.rest, s1.rest, w, panel_stride, a0, a1);
  const __m256i b = load(at(w, panel_stride, kVecs - 1));
  s0.v = _mm256_dpbusd_avx_epi32(s0.v, a0, b);
  s1.v = _mm256_dpbusd_avx_epi32(s1.v, a1, b);
}

template <int kVecs>
void one_row(const TileArgs& t) {
  const int8_t* w = t.weight;
  Vecs<kVecs> sums, odd;
  start(sums, t.column_sum, _mm256_set1_epi32(-t.offset));
  clear(odd);
  const uint8_t* block = t.panel;
  const bool far = t.prefetch_ahead > 0;
  for (int64_t left = t.k_steps; left > 0; left -= kBlockSteps, block += t.block_stride) {
    const uint8_t* a = block;
    int64_t steps = left < kBlockSteps ? left : kBlockSteps;
    for (; steps >= 2; steps -= 2, a += 2 * kStepK, w += 2 * kStepBytes) {
      if (far) {
        prefetch<0, kVecs>(w + t.prefetch_ahead, t.panel_stride);
        prefetch<0, kVecs>(w + t.prefetch_ahead + kStepBytes, t.panel_stride);
      }
      step_of_one(sums, w, t.panel_stride, broadcast4(a));
      step_of_one(odd, w + kStepBytes, t.panel_stride, broadcast4(a + kStepK));
    }
    if (steps > 0) {
      step_of_one(sums, w, t.panel_stride, broadcast4(a));
      w += kStepBytes;
    }
  }
  add(sums, odd);
  store(sums, t.acc);
}

template <int kVecs>
void two_rows(const TileArgs& t) {
  const int8_t* w = t.weight;
  Vecs<kVecs> first, second;
  start(first, t.column_sum, _mm256_set1_epi32(-t.offset));
  start(second, t.column_sum, _mm256_set1_epi32(-t.offset));
  const uint8_t* block = t.panel;
  const bool far = t.prefetch_ahead > 0;
  for (int64_t left = t.k_steps; left > 0; left -= kBlockSteps, block += t.block_stride) {
    const uint8_t* a = block;
    const uint8_t* end = a + kStepK * (left < kBlockSteps ? left : kBlockSteps);
    for (; a != end; a += kStepK, w += kStepBytes) {
      if (far) prefetch<0, kVecs>(w + t.prefetch_ahead, t.panel_stride);
      step_of_two(first, second, w, t.panel_stride, broadcast4(a), broadcast4(a + kRowStride));
    }
  }
  store(first, t.acc);
  store(second, t.acc + kMaxTileColumns);
}

template <int kCount, int kFirst, int kVecs>
void few_rows(const TileArgs& t) {
  if constexpr (kCount == 1) {
    one_row<kVecs>(t);
  } else if constexpr (kCount == 2) {
    two_rows<kVecs>(t);
  } else {
    const int8_t* w = t.weight;
    Sums<kCount, kVecs> sums;
    start(sums, t.column_sum + kFirst * kVecColumns, _mm256_set1_epi32(-t.offset));
    const uint8_t* block = t.panel;
    const bool far = t.prefetch_ahead > 0;
    for (int64_t left = t.k_steps; left > 0; left -= kBlockSteps, block += t.block_stride) {
      const uint8_t* a = block;
      const uint8_t* end = a + kStepK * (left < kBlockSteps ? left : kBlockSteps);
      for (; a != end; a += kStepK, w += kStepBytes) {
        if (far) prefetch<kFirst, kVecs>(w + t.prefetch_ahead, t.panel_stride);
        Vecs<kVecs> b;
        load<kFirst>(b, w, t.panel_stride);
        step(sums, b, a);
      }
    }
    store(sums, t.acc + kFirst * kVecColumns);
  }
}

// Few rows over whatever is left of the columns: 48, then 16 at a time.
template <int kCount>
void few(const TileArgs& t) {
  if (t.columns == kFewColumns) {
    if constexpr (kCount <= 2) return few_rows<kCount, 0, 6>(t);
    few_rows<kCount, 0, 3>(t);
    return few_rows<kCount, 3, 3>(t);
  }
  TileArgs part = t;
  for (int64_t n = 0; n < t.columns; n += kPanelColumns) {
    part.weight = t.weight + n / kPanelColumns * t.panel_stride;
    part.column_sum = t.column_sum + n;
    part.acc = t.acc + n;
    few_rows<kCount, 0, 2>(part);
  }
}

template <int kCount>
void many(const TileArgs& t) {
  const bool prefetch = t.prefetch_next != nullptr && t.k_steps > 0;
  tile_of<kCount, 0, 2>(t, prefetch ? t.prefetch_next : t.weight,
                        prefetch ? (t.prefetch_bytes + t.k_steps - 1) / t.k_steps : 0);
}

void tile(const TileArgs& t) {
  switch (t.rows) {
    case 1: return few<1>(t);
    case 2: return few<2>(t);
    case 3: return few<3>(t);
    case 4: return few<4>(t);
    case 5: return many<5>(t);
    default: return many<6>(t);
  }
}

}  // namespace

#include "weight_only_avx2.inl"

const Kernels fs::int8_gemm::kAvxVnni = {"avxvnni",
                                         fs::isa::Level::avxvnni,
                                         fs::isa::kLevelAvxVnni,
                                         Panel::kBytes,
                                         Panel::kOffset,
                                         kRows,
                                         1,
                                         kFewRows,
                                         kFewColumns,
                                         kPanelColumns,
                                         &quantize,
                                         &widen,
                                         &tile,
                                         &epilogue,
                                         &pack,
                                         nullptr,
                                         nullptr,
                                         nullptr,
                                         &weight_only,
                                         nullptr};
