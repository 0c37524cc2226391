// int8_gemm, AVX-512-VNNI (F, BW, VL, DQ, VNNI): exact, -128 included.
// Idea     vpdpbusd wants u8 * s8: x is stored as x_q + 128, and the sums start at -128 * column_sum:
//          it costs nothing.
// Tile     up to 14 rows x 32 columns: 28 sums + 2 weights + 1 broadcast = 31 of 32 registers.
//          Few rows (up to 6): 64 columns, four weight streams share a broadcast; 1 to 3 rows keep two sets of sums
//          (even and odd steps), so that the latency of vpdpbusd stays hidden. One row: a single stream, eight steps
//          side by side, where t.stream says so; two rows likewise.
// y        float32 without a residual is finished in the registers of a tile (tile_to_y); else sums go by memory.
// Reads    vnni16: one 64-byte load per 16 columns x 4 k; x by vpbroadcastd, 4 k of one row.
// Tails    n: the caller copies only its columns; k: weights are zero-padded; m: smaller instances.
// Bound    per 4 k of 14 x 32: 28 vpdpbusd on two ports = 14 cycles, 16 loads = 8 cycles: compute, once the weights
//          are in L2. One row: the read bandwidth of the level the weights lie in.
// Prefetch of weights beyond L2 alone: the next column panel comes to L2 (prefetcht1) evenly under the current one;
//          few rows ask for 1 KB ahead (prefetcht0), or for the beginnings of pages (prefetcht1), or for nothing:
//          select.cpp. The lines of y come at a tile's start or later, to be written at its end.
// Measured docs/kernels/int8_gemm.md
#include "../../runtime/simd/avx512.h"

namespace {

struct Panel {
  static constexpr int kBytes = 1;
  static constexpr int kOffset = 128;
  static __m512i flip(__m512i s8) { return _mm512_xor_si512(s8, _mm512_set1_epi8(-128)); }  // s8 -> s8 + 128 as u8
  static void store4(uint8_t* p, __m512i q0, __m512i q1, __m512i q2, __m512i q3) {
    _mm512_storeu_si512(p, flip(Simd::pack_s8(q0, q1, q2, q3)));
  }
  static void store4(uint8_t* p, const int8_t* a) { _mm512_storeu_si512(p, flip(_mm512_loadu_si512(a))); }
};

}  // namespace

#include "elementwise.inl"
#include "pack_avx.inl"

namespace {

constexpr int kRows = 14;
constexpr int kFewRows = 6;
constexpr int kManyColumns = 32;

// Registers are named through nested structs, one level a row and one a vector: gcc 12 spills an array of them, and
// these too where it inlines late, which hangs on the size of the file: hence the attributes.
template <int kVecs>
struct Vecs {
  Vecs<kVecs - 1> rest;
  __m512i v;
};
template <>
struct Vecs<0> {};

[[gnu::always_inline]] inline void load(Vecs<0>&, const int8_t*, int64_t) {}
template <int kVecs>
[[gnu::always_inline]] inline void load(Vecs<kVecs>& b, const int8_t* w, int64_t panel_stride) {
  load(b.rest, w, panel_stride);
  b.v = _mm512_loadu_si512(w + (kVecs - 1) * panel_stride);
}

// Several rows use a weight: it is loaded once. gcc 12 would read memory again for each.
[[gnu::always_inline]] inline void hold(Vecs<0>&) {}
template <int kVecs>
[[gnu::always_inline]] inline void hold(Vecs<kVecs>& b) {
  hold(b.rest);
  asm("" : "+v"(b.v));
}

[[gnu::always_inline]] inline void prefetch(Vecs<0>, const int8_t*, int64_t) {}
template <int kVecs>
[[gnu::always_inline]] inline void prefetch(Vecs<kVecs>, const int8_t* w, int64_t panel_stride) {
  prefetch(Vecs<kVecs - 1>(), w, panel_stride);
  _mm_prefetch(reinterpret_cast<const char*>(w + (kVecs - 1) * panel_stride), _MM_HINT_T0);
}

// The prefetchers of the core end at a page's end and take some lines of the next to start again: its first lines come
// to L2 beforehand, so many pages on.
constexpr int64_t kPageBytes = 4096;
inline bool begins_page(const void* p, int64_t bytes) {  // p is one of a page's first bytes, once for steps of so many
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % kPageBytes) < bytes;
}
inline void prefetch_page(const void* p, int64_t pages) {
  const uintptr_t page = reinterpret_cast<uintptr_t>(p) / kPageBytes * kPageBytes + pages * kPageBytes;
  _mm_prefetch(reinterpret_cast<const char*>(page), _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(page + 64), _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(page + 128), _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(page + 192), _MM_HINT_T1);
}

inline void prefetch_pages(Vecs<0>, const void*, int64_t, int64_t) {}
template <int kVecs>
inline void prefetch_pages(Vecs<kVecs>, const void* w, int64_t panel_stride, int64_t pages) {
  prefetch_pages(Vecs<kVecs - 1>(), w, panel_stride, pages);
  prefetch_page(static_cast<const int8_t*>(w) + (kVecs - 1) * panel_stride, pages);
}

[[gnu::always_inline]] inline void start(Vecs<0>&, const int32_t*, __m512i) {}
template <int kVecs>
[[gnu::always_inline]] inline void start(Vecs<kVecs>& s, const int32_t* column_sum, __m512i offset) {
  start(s.rest, column_sum, offset);
  s.v = _mm512_mullo_epi32(Simd::load_s32(column_sum + 16 * (kVecs - 1)), offset);
}

[[gnu::always_inline]] inline void clear(Vecs<0>&) {}
template <int kVecs>
[[gnu::always_inline]] inline void clear(Vecs<kVecs>& s) {
  clear(s.rest);
  s.v = _mm512_setzero_si512();
}

[[gnu::always_inline]] inline void multiply_add(Vecs<0>&, const Vecs<0>&, __m512i) {}
template <int kVecs>
[[gnu::always_inline]] inline void multiply_add(Vecs<kVecs>& s, const Vecs<kVecs>& b, __m512i a) {
  multiply_add(s.rest, b.rest, a);
  s.v = _mm512_dpbusd_epi32(s.v, a, b.v);
}

[[gnu::always_inline]] inline void store(const Vecs<0>&, int32_t*) {}
template <int kVecs>
[[gnu::always_inline]] inline void store(const Vecs<kVecs>& s, int32_t* acc) {
  store(s.rest, acc);
  _mm512_storeu_si512(acc + 16 * (kVecs - 1), s.v);
}

[[gnu::always_inline]] inline void add(Vecs<0>&, const Vecs<0>&) {}
template <int kVecs>
[[gnu::always_inline]] inline void add(Vecs<kVecs>& s, const Vecs<kVecs>& other) {
  add(s.rest, other.rest);
  s.v = _mm512_add_epi32(s.v, other.v);
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
[[gnu::always_inline]] inline void start(Sums<0, kVecs>&, const int32_t*, __m512i) {}
template <int kCount, int kVecs>
[[gnu::always_inline]] inline void start(Sums<kCount, kVecs>& s, const int32_t* column_sum, __m512i offset) {
  start(s.above, column_sum, offset);
  start(s.row, column_sum, offset);
}

template <int kVecs>
[[gnu::always_inline]] inline void clear(Sums<0, kVecs>&) {}
template <int kCount, int kVecs>
[[gnu::always_inline]] inline void clear(Sums<kCount, kVecs>& s) {
  clear(s.above);
  clear(s.row);
}

[[gnu::always_inline]] inline __m512i broadcast4(const uint8_t* a) {  // 4 k of one row, for 16 columns
  int32_t four;
  memcpy(&four, a, 4);
  return _mm512_set1_epi32(four);
}

template <int kVecs>
[[gnu::always_inline]] inline void step(Sums<0, kVecs>&, const Vecs<kVecs>&, const uint8_t*) {}
template <int kCount, int kVecs>
[[gnu::always_inline]] inline void step(Sums<kCount, kVecs>& s, const Vecs<kVecs>& b, const uint8_t* a) {
  step(s.above, b, a);
  multiply_add(s.row, b, broadcast4(a + (kCount - 1) * kRowStride));
}

template <int kVecs>
[[gnu::always_inline]] inline void add(Sums<0, kVecs>&, const Sums<0, kVecs>&) {}
template <int kCount, int kVecs>
[[gnu::always_inline]] inline void add(Sums<kCount, kVecs>& s, const Sums<kCount, kVecs>& other) {
  add(s.above, other.above);
  add(s.row, other.row);
}

template <int kVecs>
[[gnu::always_inline]] inline void store(const Sums<0, kVecs>&, int32_t*, int64_t) {}
template <int kCount, int kVecs>
[[gnu::always_inline]] inline void store(const Sums<kCount, kVecs>& s, int32_t* acc, int64_t stride = kMaxTileColumns) {
  store(s.above, acc, stride);
  store(s.row, acc + (kCount - 1) * stride);
}

constexpr int64_t kBlockSteps = kBlockBytes / kStepK;
constexpr int64_t kStepBytes = kPanelColumns * kStepK;  // of weights, per column panel

// For writing. By mnemonic: the intrinsic wants a flag, and a CPU without the feature takes it for a no-op.
[[gnu::always_inline]] inline void prefetch_to_write(const char* p) { asm volatile("prefetchw %0" : : "m"(*p)); }

// The step of so many from which `rows` more are asked for late, but all of them.
[[gnu::always_inline]] inline int64_t late_in(int64_t steps, int64_t rows) {
  const int64_t late = steps * 3 / 4, last = steps < rows ? 0 : steps - rows;
  return late < last ? late : last;
}

// Many rows; kPrefetch: the next column panel comes to L2 under this one, `ahead` bytes a step.
template <bool kPrefetch, int kCount, int kVecs>
__attribute__((always_inline)) inline void multiply_many(const TileArgs& t, Sums<kCount, kVecs>& sums) {
  const int8_t* w = t.weight;
  const int8_t* next = t.prefetch_next;
  const int64_t ahead = t.k_steps == 0 ? 0 : (t.prefetch_bytes + t.k_steps - 1) / t.k_steps;
  start(sums, t.column_sum, _mm512_set1_epi32(-t.offset));
  const auto one_step = [&](const uint8_t* a) __attribute__((always_inline)) {
    if constexpr (kPrefetch) {
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(next + 64), _MM_HINT_T1);
      next += ahead;
    }
    Vecs<kVecs> b;
    load(b, w, t.panel_stride);
    step(sums, b, a);
    w += kStepBytes;
  };
  const uint8_t* block = t.panel;
  const char* y = t.y;
  for (int64_t left = t.k_steps; left > 0; left -= kBlockSteps, block += t.block_stride) {
    const uint8_t* a = block;
    const int64_t steps = left < kBlockSteps ? left : kBlockSteps;
    const uint8_t* end = a + kStepK * steps;
    const uint8_t* stop = y == nullptr ? end : t.y_late ? a + kStepK * late_in(steps, kCount) : a;
    for (;;) {
      for (; a != stop; a += kStepK) one_step(a);
      if (a == end) break;
      // A row of y a step: all at once would hold up the loads.
      for (int row = 0; row < kCount && a != end; ++row, y += t.y_stride, a += kStepK) {
        prefetch_to_write(y);
        prefetch_to_write(y + 64);
        one_step(a);
      }
      stop = end;
    }
    y = nullptr;
  }
}

template <int kCount, int kVecs, bool kPrefetch>
void tile_many(const TileArgs& t) {
  Sums<kCount, kVecs> sums;
  multiply_many<kPrefetch>(t, sums);
  store(sums, t.acc, t.acc_stride);
}

// What a tile of many rows ends in: y = act(fma(sum, x_scale * weight_scale, bias)). Of the caller's arguments copies,
// which stores to y cannot change.
struct TileResult {
  const float *x_scale, *weight_scale, *bias;
  float* y;
  int64_t y_stride;
};

template <int kVecs>
struct Floats {
  Floats<kVecs - 1> rest;
  __m512 v;
};
template <>
struct Floats<0> {};

[[gnu::always_inline]] inline void load(Floats<0>&, const float*) {}
template <int kVecs>
[[gnu::always_inline]] inline void load(Floats<kVecs>& f, const float* p) {
  load(f.rest, p);
  f.v = _mm512_loadu_ps(p + 16 * (kVecs - 1));
}

template <bool kRelu>
[[gnu::always_inline]] inline void finish(const Vecs<0>&, __m512, const Floats<0>&, const Floats<0>&, float*) {}
template <bool kRelu, int kVecs>
[[gnu::always_inline]] inline void finish(const Vecs<kVecs>& s, __m512 x_scale, const Floats<kVecs>& weight_scale,
                                          const Floats<kVecs>& bias, float* y) {
  finish<kRelu>(s.rest, x_scale, weight_scale.rest, bias.rest, y);
  __m512i sum = s.v;
  asm("" : "+v"(sum));  // else gcc 12 keeps a copy of all sums in memory through the whole loop
  __m512 v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(x_scale, weight_scale.v), bias.v);
  if constexpr (kRelu) v = activate<fs::Activation::relu>(v);
  _mm512_storeu_ps(y + 16 * (kVecs - 1), v);
}

// Scales and bias of the columns come to registers once two rows are done: before, the sums hold them all.
template <bool kRelu, int kVecs>
[[gnu::always_inline]] inline void finish(const Sums<0, kVecs>&, TileResult& t, Floats<kVecs>& weight_scale,
                                          Floats<kVecs>& bias) {
  load(weight_scale, t.weight_scale);
  load(bias, t.bias);
}
template <bool kRelu, int kCount, int kVecs>
[[gnu::always_inline]] inline void finish(const Sums<kCount, kVecs>& s, TileResult& t, Floats<kVecs>& weight_scale,
                                          Floats<kVecs>& bias) {
  finish<kRelu>(s.above, t, weight_scale, bias);
  finish<kRelu>(s.row, _mm512_set1_ps(t.x_scale[kCount - 1]), weight_scale, bias, t.y + (kCount - 1) * t.y_stride);
  if constexpr (kCount <= 2) {
    asm volatile("" : "+r"(t.weight_scale), "+r"(t.bias) : : "memory");  // what follows is not to be loaded before
    load(weight_scale, t.weight_scale);
    load(bias, t.bias);
  }
}

// Without a bias -0.0 is added, as in elementwise.inl.
alignas(64) constexpr float kNoBias[kManyColumns] = {
    -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f,
    -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f};

template <int kCount, int kVecs, bool kPrefetch, bool kRelu>
[[gnu::noinline]] void tile_many_to_y(const TileArgs& t, const EpilogueArgs& e) {
  Sums<kCount, kVecs> sums;
  multiply_many<kPrefetch>(t, sums);
  const float* bias_at = e.bias ? e.bias : kNoBias;
  asm("" : "+r"(bias_at));  // a pointer to read from in both cases: gcc 12 spills where it knows the values of one
  TileResult result{e.x_scale, e.weight_scale, bias_at, static_cast<float*>(e.y), e.y_stride};
  Floats<kVecs> weight_scale, bias;
  finish<kRelu>(sums, result, weight_scale, bias);
}

// Few rows: one or two sets of sums.
template <int kCount, int kVecs, bool kTwoSets, bool kPages = false>
void tile_few(const TileArgs& t) {
  const int8_t* w = t.weight;
  Sums<kCount, kVecs> sums, odd;
  start(sums, t.column_sum, _mm512_set1_epi32(-t.offset));
  if constexpr (kTwoSets) clear(odd);
  const uint8_t* block = t.panel;
  const bool far = !kPages && t.prefetch_ahead > 0;
  // What lies ahead of a column stream's end is another panel's beginning: there, the next tile's is wanted.
  const int8_t* turn = t.weight + t.panel_stride - (kPages ? t.prefetch_pages * kPageBytes : t.prefetch_ahead);
  const int64_t next = (kVecs - 1) * t.panel_stride;
  for (int64_t left = t.k_steps; left > 0; left -= kBlockSteps, block += t.block_stride) {
    const uint8_t* a = block;
    int64_t steps = left < kBlockSteps ? left : kBlockSteps;
    if constexpr (kTwoSets) {
      for (; steps >= 2; steps -= 2, a += 2 * kStepK, w += 2 * kStepBytes) {
        if (far) {
          const int8_t* ahead = w + t.prefetch_ahead + (w < turn ? 0 : next);
          prefetch(Vecs<kVecs>(), ahead, t.panel_stride);
          prefetch(Vecs<kVecs>(), ahead + kStepBytes, t.panel_stride);
        }
        if (kPages && begins_page(w, 2 * kStepBytes))
          prefetch_pages(Vecs<kVecs>(), w + (w < turn ? 0 : next), t.panel_stride, t.prefetch_pages);
        Vecs<kVecs> b;
        load(b, w, t.panel_stride);
        if constexpr (kCount > 1) hold(b);
        step(sums, b, a);
        load(b, w + kStepBytes, t.panel_stride);
        if constexpr (kCount > 1) hold(b);
        step(odd, b, a + kStepK);
      }
    }
    for (; steps > 0; --steps, a += kStepK, w += kStepBytes) {
      if (far) prefetch(Vecs<kVecs>(), w + t.prefetch_ahead + (w < turn ? 0 : next), t.panel_stride);
      Vecs<kVecs> b;
      load(b, w, t.panel_stride);
      if constexpr (kCount > 1) hold(b);
      step(sums, b, a);
    }
  }
  if constexpr (kTwoSets) add(sums, odd);
  store(sums, t.acc);
}

// Sums for each of kSets consecutive steps.
template <int kSets, int kCount>
struct Sets {
  Sets<kSets - 1, kCount> before;
  Sums<kCount, 1> sums;
};
template <int kCount>
struct Sets<0, kCount> {};

template <int kCount>
inline void clear(Sets<0, kCount>&) {}
template <int kSets, int kCount>
inline void clear(Sets<kSets, kCount>& s) {
  clear(s.before);
  clear(s.sums);
}
template <int kCount>
inline void steps(Sets<0, kCount>&, const int8_t*, const uint8_t*) {}
template <int kSets, int kCount>
inline void steps(Sets<kSets, kCount>& s, const int8_t* w, const uint8_t* a) {
  steps(s.before, w, a);
  Vecs<1> b;
  load(b, w + (kSets - 1) * kStepBytes, 0);
  if constexpr (kCount > 1) hold(b);
  step(s.sums, b, a + (kSets - 1) * kStepK);
}

// The same for one row, x by one load and four shuffles in place of four loads: from L2 the load pipes are the bound.
inline void shuffled_steps(Sets<0, 1>&, const int8_t*, const uint8_t*) {}
template <int kSets>
inline void shuffled_steps(Sets<kSets, 1>& s, const int8_t* w, const uint8_t* a) {
  shuffled_steps(s.before, w, a);
  constexpr int kStep = kSets - 1;
  const __m128i four_steps = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + kStep / 4 * 4 * kStepK));
  const __m512i x =
      _mm512_shuffle_epi32(_mm512_broadcast_i32x4(four_steps), static_cast<_MM_PERM_ENUM>(kStep % 4 * 0x55));
  Vecs<1> b;
  load(b, w + kStep * kStepBytes, 0);
  multiply_add(s.sums.row, b, x);
}

template <int kCount>
inline void add(Sums<kCount, 1>&, const Sets<0, kCount>&) {}
template <int kSets, int kCount>
inline void add(Sums<kCount, 1>& total, const Sets<kSets, kCount>& s) {
  add(total, s.before);
  add(total, s.sums);
}

// One row or two: one column panel after the other, read from its first byte to its last as one stream; kSets steps
// side by side hide the latency of vpdpbusd. put(n, sums) takes the sums of 16 columns. Everything that a panel needs
// lies in registers: an address that waits for a load or for the vector pipes holds up the loads of the next panel.
enum class Stream { kPlain, kPages, kShuffled };
template <int kCount, int kSets, Stream kHow, class Put>
__attribute__((always_inline)) inline void stream(const TileArgs& t, const Put& put) {
  const int8_t* w = t.weight;
  const uint8_t* const panel = t.panel;
  const int64_t block_stride = t.block_stride, k_steps = t.k_steps, columns = t.columns, pages = t.prefetch_pages;
  const int32_t* const column_sum = t.column_sum;
  const __m512i offset = _mm512_set1_epi32(-t.offset);
  for (int64_t n = 0; n < columns; n += kPanelColumns) {
    Sums<kCount, 1> sums;
    Sets<kSets, kCount> sets;
    start(sums, column_sum + n, offset);
    clear(sets);
    const uint8_t* block = panel;
    for (int64_t left = k_steps; left > 0; left -= kBlockSteps, block += block_stride) {
      const uint8_t* a = block;
      int64_t i = left < kBlockSteps ? left : kBlockSteps;
      for (; i >= kSets; i -= kSets, a += kSets * kStepK, w += kSets * kStepBytes) {
        if (kHow == Stream::kPages && begins_page(w, kSets * kStepBytes)) prefetch_page(w, pages);
        if constexpr (kHow == Stream::kShuffled)
          shuffled_steps(sets, w, a);
        else
          steps(sets, w, a);
      }
      for (; i > 0; --i, a += kStepK, w += kStepBytes) {
        Vecs<1> b;
        load(b, w, 0);
        if constexpr (kCount > 1) hold(b);
        step(sums, b, a);
      }
    }
    add(sums, sets);
    put(n, sums);
  }
}

// One row; put(n, sum).
template <class Put>
inline void stream_row(const TileArgs& t, const Put& put) {
  const auto put_row = [&](int64_t n, const Sums<1, 1>& sums) __attribute__((always_inline)) {
    __m512i sum = sums.row.v;
    asm("" : "+v"(sum));  // else gcc 12 keeps a copy of the sums in memory through the whole loop
    put(n, sum);
  };
  if (t.shuffle)
    stream<1, 8, Stream::kShuffled>(t, put_row);
  else if (t.prefetch_pages > 0)
    stream<1, 8, Stream::kPages>(t, put_row);
  else
    stream<1, 8, Stream::kPlain>(t, put_row);
}

void tile_stream(const TileArgs& t) {
  int32_t* const acc = t.acc;
  stream_row(t, [=](int64_t n, __m512i sum) { _mm512_storeu_si512(acc + n, sum); });
}

void tile_stream_two(const TileArgs& t) {
  int32_t* const acc = t.acc;
  stream<2, 4, Stream::kPages>(
      t, [=](int64_t n, const Sums<2, 1>& sums) __attribute__((always_inline)) { store(sums, acc + n); });
}

template <bool kRelu>
void tile_stream_to_y(const TileArgs& t, const EpilogueArgs& e) {
  const __m512 x_scale = _mm512_set1_ps(e.x_scale[0]);
  const float* const weight_scale = e.weight_scale;
  const float* const bias = e.bias;
  float* const y = static_cast<float*>(e.y);
  stream_row(t, [=](int64_t n, __m512i sum) {
    const __m512 scale = _mm512_mul_ps(x_scale, _mm512_loadu_ps(weight_scale + n));
    __m512 v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_loadu_ps(bias ? bias + n : kNoBias));
    if constexpr (kRelu) v = activate<fs::Activation::relu>(v);
    _mm512_storeu_ps(y + n, v);
  });
}

// Few rows over whatever is left of the columns: 64, then 16 at a time.
template <int kCount>
void few(const TileArgs& t) {
  constexpr bool kTwoSets = kCount <= 3;
  if (kCount == 1 && t.stream) return tile_stream(t);
  if (kCount == 2 && t.stream) return tile_stream_two(t);
  TileArgs part = t;
  int64_t n = 0;
  const auto skip = [&](int64_t columns) {
    n += columns;
    part.weight = t.weight + n / kPanelColumns * t.panel_stride;
    part.column_sum = t.column_sum + n;
    part.acc = t.acc + n;
  };
  if constexpr (kCount <= 2)
    if (t.prefetch_pages > 0)
      for (; n + kMaxTileColumns <= t.columns; skip(kMaxTileColumns)) tile_few<kCount, 4, kTwoSets, true>(part);
  for (; n + kMaxTileColumns <= t.columns; skip(kMaxTileColumns)) tile_few<kCount, 4, kTwoSets>(part);
  for (; n < t.columns; skip(kPanelColumns)) tile_few<kCount, 1, kTwoSets>(part);
}

template <int kCount>
void many(const TileArgs& t) {
  if (t.columns != kManyColumns) return tile_many<kCount, 1, false>(t);
  if (t.prefetch_next != nullptr) return tile_many<kCount, 2, true>(t);
  tile_many<kCount, 2, false>(t);
}

void tile(const TileArgs& t) {
  switch (t.rows) {
    case 1: return few<1>(t);
    case 2: return few<2>(t);
    case 3: return few<3>(t);
    case 4: return few<4>(t);
    case 5: return few<5>(t);
    case 6: return few<6>(t);
    case 7: return many<7>(t);
    case 8: return many<8>(t);
    case 9: return many<9>(t);
    case 10: return many<10>(t);
    case 11: return many<11>(t);
    case 12: return many<12>(t);
    case 13: return many<13>(t);
    default: return many<14>(t);
  }
}

template <int kCount, bool kRelu>
void many_to_y(const TileArgs& t, const EpilogueArgs& e) {
  if (t.prefetch_next != nullptr) return tile_many_to_y<kCount, 2, true, kRelu>(t, e);
  tile_many_to_y<kCount, 2, false, kRelu>(t, e);
}

template <bool kRelu>
void many_to_y(const TileArgs& t, const EpilogueArgs& e) {
  switch (t.rows) {
    case 7: return many_to_y<7, kRelu>(t, e);
    case 8: return many_to_y<8, kRelu>(t, e);
    case 9: return many_to_y<9, kRelu>(t, e);
    case 10: return many_to_y<10, kRelu>(t, e);
    case 11: return many_to_y<11, kRelu>(t, e);
    case 12: return many_to_y<12, kRelu>(t, e);
    case 13: return many_to_y<13, kRelu>(t, e);
    default: return many_to_y<14, kRelu>(t, e);
  }
}

// Whole tiles of many rows, or of one, whose y is float32 without a residual; gelu and silu would want registers that
// the sums hold.
bool tile_to_y(const TileArgs& t, const EpilogueArgs& e) {
  const bool relu = e.activation == fs::Activation::relu;
  if (e.dtype != DType::f32 || e.requantize || e.residual != nullptr ||
      !(relu || e.activation == fs::Activation::none) || e.columns != t.columns)
    return false;
  if (t.rows == 1 && t.stream) {
    if (relu)
      tile_stream_to_y<true>(t, e);
    else
      tile_stream_to_y<false>(t, e);
    return true;
  }
  if (t.rows <= kFewRows || e.columns != kManyColumns) return false;
  if (relu)
    many_to_y<true>(t, e);
  else
    many_to_y<false>(t, e);
  return true;
}

}  // namespace

#include "weight_only_avx512.inl"

const Kernels fs::int8_gemm::kAvx512 = {"avx512",
                                        fs::isa::Level::avx512,
                                        fs::isa::kLevelAvx512,
                                        Panel::kBytes,
                                        Panel::kOffset,
                                        kRows,
                                        1,
                                        kFewRows,
                                        kMaxTileColumns,
                                        kManyColumns,
                                        &quantize,
                                        &widen,
                                        &tile,
                                        &epilogue,
                                        &pack,
                                        nullptr,
                                        nullptr,
                                        nullptr,
                                        &weight_only,
                                        &tile_to_y,
                                        true,
                                        true};
