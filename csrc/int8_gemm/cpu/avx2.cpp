// int8_gemm, AVX2 (with FMA, F16C): exact over the whole range of s8, -128 included.
// Idea     vpmaddwd on s16 cannot saturate (vpmaddubsw does): x is widened to s16 once, in its panel; weights are
//          widened as they are loaded (vpmovsxbw) from the same vnni16 layout that AVX-512 reads.
// Tile     6 rows x 8 columns: an accumulator holds 4 columns x 2 partial sums, so 12 + 2 weights + 1 x of 16
//          registers. Few rows: 3 x 16, weights consumed as they come.
// Reads    16 bytes of weights = 4 columns x 4 k; x by vpbroadcastq, 4 k of one row. From 5 tiles on that share a
//          column panel its weights are widened once, ahead of them: unpacking shares the ports of the products.
// Tails    n: the caller copies only its columns; k: weights are zero-padded; m: smaller instances.
// Bound    one vpmaddwd + one vpaddd per 16 products. Where vpmaddwd runs at the rate of FMA (Intel): 1.5x the FMA
//          ceiling; where it runs on one 128-bit pipe (Zen 1) or at half the FMA rate (Zen 2): 1.0x.
// Measured docs/kernels/int8_gemm.md
#include "../../runtime/simd/avx2.h"

namespace {

struct Panel {
  static constexpr int kBytes = 2;
  static constexpr int kOffset = 0;
  static void store2(uint8_t* p, __m256i q0, __m256i q1) {  // the pack works in halves; the permutation puts them right
    const __m256i s16 = _mm256_permute4x64_epi64(_mm256_packs_epi32(q0, q1), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), s16);
  }
  static void store4(uint8_t* p, __m256i q0, __m256i q1, __m256i q2, __m256i q3) {
    store2(p, q0, q1);
    store2(p + 32, q2, q3);
  }
  static void store4(uint8_t* p, const int8_t* a) {
    const auto* s8 = reinterpret_cast<const __m128i*>(a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvtepi8_epi16(_mm_loadu_si128(s8)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), _mm256_cvtepi8_epi16(_mm_loadu_si128(s8 + 1)));
  }
};

}  // namespace

#include "elementwise.inl"
#include "pack_avx.inl"

namespace {

constexpr int kRows = 6;
constexpr int kFewRows = 3;

// Registers are named through nested structs, one level a row and one a vector: gcc 12 spills an array of them.
template <int kVecs>
struct Vecs {
  Vecs<kVecs - 1> rest;
  __m256i v;
};
template <>
struct Vecs<0> {};

inline __m256i widened_weights(const int8_t* w) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
}

inline void load(Vecs<0>&, const int8_t*) {}
template <int kVecs>
inline void load(Vecs<kVecs>& b, const int8_t* w) {
  load(b.rest, w);
  b.v = widened_weights(w + 16 * (kVecs - 1));
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
  s.v = _mm256_add_epi32(s.v, _mm256_madd_epi16(a, b.v));
}

// The two partial sums of a column stand side by side: 8 columns from two vectors, minus the compensation.
inline void finish(const Vecs<0>&, const int32_t*, __m256i, int32_t*) {}
template <int kVecs>
inline void finish(const Vecs<kVecs>& s, const int32_t* column_sum, __m256i offset, int32_t* acc) {
  static_assert(kVecs % 2 == 0, "columns come in eights");
  finish(s.rest.rest, column_sum, offset, acc);
  const int j = 4 * (kVecs - 2);
  const __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(s.rest.v, s.v), 0xd8);
  const __m256i compensation = _mm256_mullo_epi32(Simd::load_s32(column_sum + j), offset);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + j), _mm256_sub_epi32(sum, compensation));
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
inline void clear(Sums<0, kVecs>&) {}
template <int kCount, int kVecs>
inline void clear(Sums<kCount, kVecs>& s) {
  clear(s.above);
  clear(s.row);
}

inline __m256i broadcast4(const uint8_t* a) {  // 4 k of one row, for 4 columns
  int64_t four;
  memcpy(&four, a, 8);
  return _mm256_set1_epi64x(four);
}

// Nothing of the next row comes before these sums: gcc 12 may broadcast and multiply all rows of a step first, and has
// no registers left for half of the sums.
inline void settle(Vecs<0>&) {}
template <int kVecs>
inline void settle(Vecs<kVecs>& s) {
  settle(s.rest);
  asm volatile("" : "+x"(s.v)::"memory");
}

template <int kVecs>
inline void step(Sums<0, kVecs>&, const Vecs<kVecs>&, const uint8_t*) {}
template <int kCount, int kVecs>
inline void step(Sums<kCount, kVecs>& s, const Vecs<kVecs>& b, const uint8_t* a) {
  step(s.above, b, a);
  multiply_add(s.row, b, broadcast4(a + (kCount - 1) * kRowStride));
  if constexpr (kVecs == 2) settle(s.row);  // few rows: their weights are consumed as they come
}

template <int kVecs>
inline void finish(const Sums<0, kVecs>&, const int32_t*, __m256i, int32_t*) {}
template <int kCount, int kVecs>
inline void finish(const Sums<kCount, kVecs>& s, const int32_t* column_sum, __m256i offset, int32_t* acc) {
  finish(s.above, column_sum, offset, acc);
  finish(s.row, column_sum, offset, acc + (kCount - 1) * kMaxTileColumns);
}

// Weights that widen_weights() wrote.
inline void load_widened(Vecs<0>&, const int8_t*) {}
template <int kVecs>
inline void load_widened(Vecs<kVecs>& b, const int8_t* w) {
  load_widened(b.rest, w);
  b.v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * (kVecs - 1)));
}

constexpr int64_t kBlockSteps = kBlockBytes / Panel::kBytes / kStepK;
constexpr int kHalf = 8;                                        // columns that are widened side by side
constexpr int64_t kHalfBytes = kHalf * kStepK * Panel::kBytes;  // of a step

// One column panel as s16: its first 8 columns for all k, then the others.
void widen_weights(const int8_t* panel, int64_t k_steps, int8_t* out) {
  for (int64_t half = 0; half < kPanelColumns / kHalf; ++half) {
    const int8_t* w = panel + half * kHalf * kStepK;
    for (int64_t i = 0; i < k_steps; ++i, w += kPanelColumns * kStepK, out += kHalfBytes) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), widened_weights(w));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), widened_weights(w + 16));
    }
  }
}

// A column panel from widened weights, 8 columns at a time; the next one comes to L2 meanwhile.
template <int kCount>
void tile_widened(const TileArgs& t) {
  const __m256i offset = _mm256_set1_epi32(t.offset);
  const int8_t* w = t.widened;
  const int8_t* next = t.prefetch_next == nullptr ? t.widened : t.prefetch_next;
  const int64_t steps_of_all = kPanelColumns / kHalf * t.k_steps;
  const int64_t ahead =
      t.prefetch_next == nullptr || t.k_steps == 0 ? 0 : (t.prefetch_bytes + steps_of_all - 1) / steps_of_all;
  for (int64_t n = 0; n < kPanelColumns; n += kHalf) {
    const uint8_t* block = t.panel;
    Sums<kCount, 2> sums;
    clear(sums);
    for (int64_t left = t.k_steps; left > 0; left -= kBlockSteps, block += t.block_stride) {
      const int64_t steps = left < kBlockSteps ? left : kBlockSteps;
      const uint8_t* a = block;
      for (int64_t i = 0; i < steps; ++i, a += kStepK * Panel::kBytes, w += kHalfBytes) {
        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
        next += ahead;
        Vecs<2> b;
        load_widened(b, w);
        step(sums, b, a);
      }
    }
    finish(sums, t.column_sum + n, offset, t.acc + n);
  }
}

// All columns of the call, 4 * kVecs at a time.
template <int kCount, int kVecs>
void tile_of(const TileArgs& t) {
  constexpr int kColumns = 4 * kVecs;
  const __m256i offset = _mm256_set1_epi32(t.offset);
  for (int64_t n = 0; n < t.columns; n += kColumns) {
    const int8_t* w = t.weight + n / kPanelColumns * t.panel_stride + n % kPanelColumns * kStepK;
    const uint8_t* block = t.panel;
    Sums<kCount, kVecs> sums;
    clear(sums);
    for (int64_t left = t.k_steps; left > 0; left -= kBlockSteps, block += t.block_stride) {
      const int64_t steps = left < kBlockSteps ? left : kBlockSteps;
      const uint8_t* a = block;
      for (int64_t i = 0; i < steps; ++i, a += kStepK * Panel::kBytes, w += kPanelColumns * kStepK) {
        _mm_prefetch(reinterpret_cast<const char*>(w + t.prefetch_ahead), _MM_HINT_T0);
        Vecs<kVecs> b;
        load(b, w);
        step(sums, b, a);
      }
    }
    finish(sums, t.column_sum + n, offset, t.acc + n);
  }
}

void tile(const TileArgs& t) {
  switch (t.rows) {
    case 1: return tile_of<1, 4>(t);
    case 2: return tile_of<2, 4>(t);
    case 3: return tile_of<3, 4>(t);
    case 4: return t.widened ? tile_widened<4>(t) : tile_of<4, 2>(t);
    case 5: return t.widened ? tile_widened<5>(t) : tile_of<5, 2>(t);
    default: return t.widened ? tile_widened<6>(t) : tile_of<6, 2>(t);
  }
}

}  // namespace

#include "weight_only_avx2.inl"

const Kernels fs::int8_gemm::kAvx2 = {"avx2",
                                      fs::isa::Level::avx2,
                                      fs::isa::kLevelAvx2,
                                      Panel::kBytes,
                                      Panel::kOffset,
                                      kRows,
                                      1,
                                      kFewRows,
                                      kMaxTileColumns,
                                      kPanelColumns,
                                      &quantize,
                                      &widen,
                                      &tile,
                                      &epilogue,
                                      &pack,
                                      nullptr,
                                      nullptr,
                                      &widen_weights,
                                      &weight_only,
                                      nullptr};
