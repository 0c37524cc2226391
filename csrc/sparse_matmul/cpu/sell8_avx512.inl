// sell8, sell8x32 and sell8x16, AVX-512. Before this: kernels.inl.
// Idea     64 outputs in step; the 64 x that a step may use lie in four registers, and a lane's is picked by vpermi2ps
//          (32 of them) twice and a blend: no gather, and the four loads serve all 64 outputs. A group's indices are
//          loaded once: vpermi2ps looks at the low five bits of a dword, so step j shifts them by 8 j.
//          sell8x32: 32 outputs and a window of 32, two registers, so one vpermi2ps and no blend.
//          sell8x16: narrow slices of 16 outputs with windows of 32 beside slices of sell8.
//          bfloat16: a dword holds the values of two lanes; a shift and a mask widen them.
// Tile     64 outputs x 1 to 4 rows: 4 zmm sums a row, 4 of x, 4 of indices. sell8x32: 32 outputs, half of all that.
// Bound    a step of 64 outputs: 8 vpermi2ps, 4 tests, blends and FMAs: 7.2 cycles on Zen 5 with weights in L1, 10 in
//          L2, whose lines share L1 with 9 loads; else bytes (105 of 125 GB/s from L3). Zen 4: vpermi2ps, FMAs, shifts
//          and vptestmd share three pipes, 15 cycles for one row, 59 for four; two steps of sell8x32 14 and 34.

namespace {

// How far ahead groups are asked for, where they are (FewArgs::prefetch).
constexpr int64_t kSell8Ahead = 8 * sell8_group_bytes(kSell8Rows, 4);

// The values of 32 lanes.
struct SellValues {
  __m512 low, high;
};
inline SellValues sell8_values(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
inline SellValues sell8_values(const uint16_t* p) {
  const __m512i pairs = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
}

template <int kRows>
struct SellSums {
  SellSums<kRows - 1> above;
  __m512 a, b, c, d;
};
template <>
struct SellSums<0> {};

inline void clear(SellSums<0>&) {}
template <int kRows>
inline void clear(SellSums<kRows>& s) {
  clear(s.above);
  s.a = s.b = s.c = s.d = _mm512_setzero_ps();
}

// The indices of a step, in the low byte of each dword, and which of them are above 31.
struct SellIndex {
  __m512i a, b, c, d;
  __mmask16 high_a, high_b, high_c, high_d;
};

// The x of 16 lanes.
inline __m512 pick(__m512 x0, __m512 x1, __m512 x2, __m512 x3, __m512i index, __mmask16 high) {
  return _mm512_mask_blend_ps(high, _mm512_permutex2var_ps(x0, index, x1), _mm512_permutex2var_ps(x2, index, x3));
}

template <class T>
inline void add_step(SellSums<0>&, const T*, const SellIndex&, const float*, int64_t) {}
template <class T, int kRows>
inline void add_step(SellSums<kRows>& s, const T* value, const SellIndex& i, const float* x, int64_t stride) {
  add_step(s.above, value, i, x, stride);
  x += (kRows - 1) * stride;
  const __m512 x0 = _mm512_loadu_ps(x), x1 = _mm512_loadu_ps(x + 16);
  const __m512 x2 = _mm512_loadu_ps(x + 32), x3 = _mm512_loadu_ps(x + 48);
  const SellValues w = sell8_values(value), v = sell8_values(value + 32);
  s.a = _mm512_fmadd_ps(w.low, pick(x0, x1, x2, x3, i.a, i.high_a), s.a);
  s.b = _mm512_fmadd_ps(w.high, pick(x0, x1, x2, x3, i.b, i.high_b), s.b);
  s.c = _mm512_fmadd_ps(v.low, pick(x0, x1, x2, x3, i.c, i.high_c), s.c);
  s.d = _mm512_fmadd_ps(v.high, pick(x0, x1, x2, x3, i.d, i.high_d), s.d);
}

template <int kStep, class T, bool kAhead, int kRows>
inline void add_step(SellSums<kRows>& s, const uint8_t* group, __m512i a, __m512i b, __m512i c, __m512i d,
                     const uint16_t* base, const FewArgs& args) {
  const __m512i above_31 = _mm512_set1_epi32(32 << 8 * kStep);
  const SellIndex i{kStep == 0 ? a : _mm512_srli_epi32(a, 8 * kStep),
                    kStep == 0 ? b : _mm512_srli_epi32(b, 8 * kStep),
                    kStep == 0 ? c : _mm512_srli_epi32(c, 8 * kStep),
                    kStep == 0 ? d : _mm512_srli_epi32(d, 8 * kStep),
                    _mm512_test_epi32_mask(a, above_31),
                    _mm512_test_epi32_mask(b, above_31),
                    _mm512_test_epi32_mask(c, above_31),
                    _mm512_test_epi32_mask(d, above_31)};
  constexpr int kLines = static_cast<int>(sell8_group_bytes(kSell8Rows, sizeof(T)) / kSell8Steps / 64);
  for (int line = 0; kAhead && line < kLines; ++line)
    __builtin_prefetch(group + kSell8Ahead + (kLines * kStep + line) * 64);
  add_step(s, reinterpret_cast<const T*>(group + kSell8Steps * kSell8Rows) + kStep * kSell8Rows, i,
           sell_x(args.x, base[kStep]), args.x_stride);
}

inline void scatter(const SellSums<0>&, const uint32_t*, int64_t, float*, int64_t) {}
template <int kRows>
inline void scatter(const SellSums<kRows>& s, const uint32_t* row, int64_t n, float* y, int64_t stride) {
  scatter(s.above, row, n, y, stride);
  float lanes[kSell8Rows];
  _mm512_storeu_ps(lanes, s.a);
  _mm512_storeu_ps(lanes + 16, s.b);
  _mm512_storeu_ps(lanes + 32, s.c);
  _mm512_storeu_ps(lanes + 48, s.d);
  scatter_lanes<kSell8Rows>(lanes, row, n, y + (kRows - 1) * stride);
}

template <class T, bool kAhead, int kRows>
void sell8_rows(const FewArgs& args) {
  const Pack& p = args.pack;
  for (int64_t slice = args.begin; slice < args.end; ++slice) {
    const int64_t begin = at_most(p.offset[slice], p.total), end = at_most(p.offset[slice + 1], p.total);
    SellSums<kRows> sums;
    clear(sums);
    for (int64_t g = begin; g < end; ++g) {
      const uint8_t* const group = p.group + g * sell8_group_bytes(kSell8Rows, sizeof(T));
      const uint16_t* const base = p.base + g * kSell8Steps;
      const __m512i a = _mm512_loadu_si512(group), b = _mm512_loadu_si512(group + 64);
      const __m512i c = _mm512_loadu_si512(group + 128), d = _mm512_loadu_si512(group + 192);
      add_step<0, T, kAhead>(sums, group, a, b, c, d, base, args);
      add_step<1, T, kAhead>(sums, group, a, b, c, d, base, args);
      add_step<2, T, kAhead>(sums, group, a, b, c, d, base, args);
      add_step<3, T, kAhead>(sums, group, a, b, c, d, base, args);
    }
    scatter(sums, p.row + slice * kSell8Rows, p.n, args.y, args.y_stride);
  }
}

// --- sell8x32 ---

template <int kRows>
struct NarrowSums {
  NarrowSums<kRows - 1> above;
  __m512 a, b;
};
template <>
struct NarrowSums<0> {};

inline void clear(NarrowSums<0>&) {}
template <int kRows>
inline void clear(NarrowSums<kRows>& s) {
  clear(s.above);
  s.a = s.b = _mm512_setzero_ps();
}

// In a register: gcc 12 would load it for every use, and loads are what several rows have least of.
inline __m512 held(__m512 v) {
  asm("" : "+v"(v));
  return v;
}

// The values and indices of a step.
struct NarrowStep {
  SellValues value;
  __m512i index_a, index_b;
};

inline void add_step(NarrowSums<0>&, const NarrowStep&, const float*, int64_t) {}
template <int kRows>
inline void add_step(NarrowSums<kRows>& s, const NarrowStep& w, const float* x, int64_t stride) {
  add_step(s.above, w, x, stride);
  x += (kRows - 1) * stride;
  const __m512 x0 = held(_mm512_loadu_ps(x)), x1 = held(_mm512_loadu_ps(x + 16));
  s.a = _mm512_fmadd_ps(w.value.low, _mm512_permutex2var_ps(x0, w.index_a, x1), s.a);
  s.b = _mm512_fmadd_ps(w.value.high, _mm512_permutex2var_ps(x0, w.index_b, x1), s.b);
}

template <int kStep, class T, int kRows>
inline void add_step(NarrowSums<kRows>& s, const uint8_t* group, __m512i a, __m512i b, const uint16_t* base,
                     const FewArgs& args) {
  const auto* const value = reinterpret_cast<const T*>(group + kSell8Steps * kSell8x32Rows) + kStep * kSell8x32Rows;
  const SellValues v = sell8_values(value);
  const NarrowStep w{{held(v.low), held(v.high)},
                     kStep == 0 ? a : _mm512_srli_epi32(a, 8 * kStep),
                     kStep == 0 ? b : _mm512_srli_epi32(b, 8 * kStep)};
  add_step(s, w, sell_x(args.x, base[kStep]), args.x_stride);
}

inline void scatter(const NarrowSums<0>&, const uint32_t*, int64_t, float*, int64_t) {}
template <int kRows>
inline void scatter(const NarrowSums<kRows>& s, const uint32_t* row, int64_t n, float* y, int64_t stride) {
  scatter(s.above, row, n, y, stride);
  float lanes[kSell8x32Rows];
  _mm512_storeu_ps(lanes, s.a);
  _mm512_storeu_ps(lanes + 16, s.b);
  scatter_lanes<kSell8x32Rows>(lanes, row, n, y + (kRows - 1) * stride);
}

template <class T, bool kAhead, int kRows>
void sell8x32_rows(const FewArgs& args) {
  constexpr int64_t kGroupBytes = sell8_group_bytes(kSell8x32Rows, sizeof(T));
  const Pack& p = args.pack;
  for (int64_t slice = args.begin; slice < args.end; ++slice) {
    const int64_t begin = at_most(p.offset[slice], p.total), end = at_most(p.offset[slice + 1], p.total);
    NarrowSums<kRows> sums;
    clear(sums);
    for (int64_t g = begin; g < end; ++g) {
      const uint8_t* const group = p.group + g * kGroupBytes;
      const uint16_t* const base = p.base + g * kSell8Steps;
      for (int64_t at = 0; kAhead && at < kGroupBytes; at += 64) __builtin_prefetch(group + kSell8Ahead + at);
      const __m512i a = _mm512_loadu_si512(group), b = _mm512_loadu_si512(group + 64);
      add_step<0, T>(sums, group, a, b, base, args);
      add_step<1, T>(sums, group, a, b, base, args);
      add_step<2, T>(sums, group, a, b, base, args);
      add_step<3, T>(sums, group, a, b, base, args);
    }
    scatter(sums, p.row + slice * kSell8x32Rows, p.n, args.y, args.y_stride);
  }
}

// --- sell8x16, the narrow slices ---

template <int kRows>
struct LaneSums {
  LaneSums<kRows - 1> above;
  __m512 a;
};
template <>
struct LaneSums<0> {};

inline void clear(LaneSums<0>&) {}
template <int kRows>
inline void clear(LaneSums<kRows>& s) {
  clear(s.above);
  s.a = _mm512_setzero_ps();
}

inline void add_step(LaneSums<0>&, __m512, __m512i, const float*, int64_t) {}
template <int kRows>
inline void add_step(LaneSums<kRows>& s, __m512 value, __m512i index, const float* x, int64_t stride) {
  add_step(s.above, value, index, x, stride);
  x += (kRows - 1) * stride;
  s.a = _mm512_fmadd_ps(value, _mm512_permutex2var_ps(_mm512_loadu_ps(x), index, _mm512_loadu_ps(x + 16)), s.a);
}

template <int kStep, int kRows>
inline void add_step(LaneSums<kRows>& s, const uint8_t* group, __m512i index, const uint16_t* base,
                     const FewArgs& args) {
  const auto* const value = reinterpret_cast<const float*>(group + kSell8Steps * kSell8x16Rows) + kStep * kSell8x16Rows;
  add_step(s, _mm512_loadu_ps(value), kStep == 0 ? index : _mm512_srli_epi32(index, 8 * kStep),
           sell_x(args.x, base[kStep]), args.x_stride);
}

inline void scatter(const LaneSums<0>&, const uint32_t*, int64_t, float*, int64_t) {}
template <int kRows>
inline void scatter(const LaneSums<kRows>& s, const uint32_t* row, int64_t n, float* y, int64_t stride) {
  scatter(s.above, row, n, y, stride);
  float lanes[kSell8x16Rows];
  _mm512_storeu_ps(lanes, s.a);
  scatter_lanes<kSell8x16Rows>(lanes, row, n, y + (kRows - 1) * stride);
}

template <int kRows>
void sell8x16_rows(const FewArgs& args) {
  const Pack& p = args.pack;
  for (int64_t slice = args.begin; slice < args.end; ++slice) {
    const int64_t begin = at_most(p.offset[slice], p.total), end = at_most(p.offset[slice + 1], p.total);
    LaneSums<kRows> sums;
    clear(sums);
    for (int64_t g = begin; g < end; ++g) {
      const uint8_t* const group = p.group + g * sell8_group_bytes(kSell8x16Rows, 4);
      const uint16_t* const base = p.base + g * kSell8Steps;
      const __m512i index = _mm512_loadu_si512(group);
      add_step<0>(sums, group, index, base, args);
      add_step<1>(sums, group, index, base, args);
      add_step<2>(sums, group, index, base, args);
      add_step<3>(sums, group, index, base, args);
    }
    scatter(sums, p.row + slice * kSell8x16Rows, p.n, args.y, args.y_stride);
  }
}

void sell8x16(const FewArgs& a) {
  switch (a.rows) {
    case 1: return sell8x16_rows<1>(a);
    case 2: return sell8x16_rows<2>(a);
    case 3: return sell8x16_rows<3>(a);
    default: return sell8x16_rows<4>(a);
  }
}

template <class T, bool kAhead>
void sell8_of(const FewArgs& a) {
  const bool wide = a.pack.block == kSell8Rows;
  switch (a.rows) {
    case 1: return wide ? sell8_rows<T, kAhead, 1>(a) : sell8x32_rows<T, kAhead, 1>(a);
    case 2: return wide ? sell8_rows<T, kAhead, 2>(a) : sell8x32_rows<T, kAhead, 2>(a);
    case 3: return wide ? sell8_rows<T, kAhead, 3>(a) : sell8x32_rows<T, kAhead, 3>(a);
    default: return wide ? sell8_rows<T, kAhead, 4>(a) : sell8x32_rows<T, kAhead, 4>(a);
  }
}

void sell8(const FewArgs& a) {
  if (a.pack.block == kSell8x16Rows) return sell8x16(a);
  if (a.pack.bf16) return a.prefetch ? sell8_of<uint16_t, true>(a) : sell8_of<uint16_t, false>(a);
  a.prefetch ? sell8_of<float, true>(a) : sell8_of<float, false>(a);
}

}  // namespace
