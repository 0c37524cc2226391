// sell8, AVX-512. Before this: kernels.inl.
// Idea     64 outputs in step; the 64 x that a step may use lie in four registers, and a lane's is picked by vpermi2ps
//          (32 of them) twice and a blend: no gather, and the four loads serve all 64 outputs. A group's indices are
//          loaded once: vpermi2ps looks at the low five bits of a dword, so step j shifts them by 8 j.
// Tile     64 outputs x 1 to 4 rows: 4 zmm sums a row, 4 of x, 4 of indices.
// Bound    a step of 64 outputs: 8 vpermi2ps, 9 loads: 4.7 cycles on Zen 5 while the weights are in L2; else bytes (105
// of
//          125 GB/s from L3).

namespace {

// How far ahead groups are asked for. From L3 it makes no difference here (the hardware follows the one stream), from
// DRAM 10% at 50 and 80% zeros.
constexpr int64_t kSell8Ahead = 8 * kSell8GroupBytes;

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

inline void add_step(SellSums<0>&, const float*, const SellIndex&, const float*, int64_t) {}
template <int kRows>
inline void add_step(SellSums<kRows>& s, const float* value, const SellIndex& i, const float* x, int64_t stride) {
  add_step(s.above, value, i, x, stride);
  x += (kRows - 1) * stride;
  const __m512 x0 = _mm512_loadu_ps(x), x1 = _mm512_loadu_ps(x + 16);
  const __m512 x2 = _mm512_loadu_ps(x + 32), x3 = _mm512_loadu_ps(x + 48);
  s.a = _mm512_fmadd_ps(_mm512_loadu_ps(value), pick(x0, x1, x2, x3, i.a, i.high_a), s.a);
  s.b = _mm512_fmadd_ps(_mm512_loadu_ps(value + 16), pick(x0, x1, x2, x3, i.b, i.high_b), s.b);
  s.c = _mm512_fmadd_ps(_mm512_loadu_ps(value + 32), pick(x0, x1, x2, x3, i.c, i.high_c), s.c);
  s.d = _mm512_fmadd_ps(_mm512_loadu_ps(value + 48), pick(x0, x1, x2, x3, i.d, i.high_d), s.d);
}

template <int kStep, int kRows>
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
  for (int line = 0; line < 5; ++line) __builtin_prefetch(group + kSell8Ahead + (5 * kStep + line) * 64);
  add_step(s, reinterpret_cast<const float*>(group + kSell8IndexBytes) + kStep * kSell8Rows, i,
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

template <int kRows>
void sell8_rows(const FewArgs& args) {
  const Pack& p = args.pack;
  for (int64_t slice = args.begin; slice < args.end; ++slice) {
    const int64_t begin = at_most(p.offset[slice], p.total), end = at_most(p.offset[slice + 1], p.total);
    SellSums<kRows> sums;
    clear(sums);
    for (int64_t g = begin; g < end; ++g) {
      const uint8_t* const group = p.group + g * kSell8GroupBytes;
      const uint16_t* const base = p.base + g * kSell8Steps;
      const __m512i a = _mm512_loadu_si512(group), b = _mm512_loadu_si512(group + 64);
      const __m512i c = _mm512_loadu_si512(group + 128), d = _mm512_loadu_si512(group + 192);
      add_step<0>(sums, group, a, b, c, d, base, args);
      add_step<1>(sums, group, a, b, c, d, base, args);
      add_step<2>(sums, group, a, b, c, d, base, args);
      add_step<3>(sums, group, a, b, c, d, base, args);
    }
    scatter(sums, p.row + slice * kSell8Rows, p.n, args.y, args.y_stride);
  }
}

void sell8(const FewArgs& a) {
  switch (a.rows) {
    case 1: return sell8_rows<1>(a);
    case 2: return sell8_rows<2>(a);
    case 3: return sell8_rows<3>(a);
    default: return sell8_rows<4>(a);
  }
}

}  // namespace
