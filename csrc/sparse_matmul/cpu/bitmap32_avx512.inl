// bitmap32, AVX-512. Before this: kernels.inl.
// Idea     vexpandps from memory spreads 16 values over the set bits of a mask. Several blocks side by side: one output
// is
//          one chain of additions, 4 cycles a k, in which four to six vexpandps could run.
// Tile     2 blocks (64 outputs) x 1 to 4 rows, 4 zmm sums a row.
// Bound    64 weights, Zen 5: four vexpandps and their masks share two ports, 5.9 cycles; 7.3 reached. bfloat16 with
// VBMI2:
//          two vpexpandw, 4.9 cycles.
// Tried    Four blocks side by side: spills. The expansion from a register instead of memory: 5% slower. vpexpandb of
// ranks
//          and vpermi2ps (64 weights at once): 5.6 cycles, no format of its own.

namespace {

// How far ahead values are asked for: 4 KB is as good from DRAM and 5 to 10% slower from L3, 8 KB 10 to 25%; none costs
// 20% from L3 and up to three quarters from DRAM.
constexpr int64_t kAheadBytes = 2048;

// The weights of a block for one k, in the order that Values::ordered undoes.
struct BitmapPair {
  __m512 low, high;
};

// Zen 5 waits for what the destination of an expansion held before, zeroing mask or not: so it gets a zero that waits
// for nothing. An expansion from memory reads no more than the values of set bits. Masks come from memory and are
// shifted: through general registers they cost twice as much.
struct Float32Values {
  using T = float;
  static __m512 expand16(const float* p, __mmask32 mask) {
    __m512 v = _mm512_setzero_ps();
    asm("vexpandps %1, %0 %{%2%}" : "+v"(v) : "m"(*reinterpret_cast<const float (*)[16]>(p)), "Yk"(mask));
    return v;
  }
  static BitmapPair expand(const float* value, uint32_t m, __mmask32 mask) {
    return {expand16(value, mask), expand16(value + low_bits(m), _kshiftri_mask32(mask, 16))};
  }
  static BitmapPair ordered(const BitmapPair& p) { return p; }
};

struct Bf16Values {
  using T = uint16_t;
  static __m512 expand16(const uint16_t* p, __mmask32 mask) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    __m512 v = _mm512_setzero_ps();
    asm("vexpandps %1, %0 %{%2%}" : "+v"(v) : "v"(_mm512_slli_epi32(bits, 16)), "Yk"(mask));
    return v;
  }
  static BitmapPair expand(const uint16_t* value, uint32_t m, __mmask32 mask) {
    return {expand16(value, mask), expand16(value + low_bits(m), _kshiftri_mask32(mask, 16))};
  }
  static BitmapPair ordered(const BitmapPair& p) { return p; }
};

// With VBMI2 all 32 at once; the even and the odd outputs are then the low and the high halves of dwords.
struct Bf16Vbmi2Values {
  using T = uint16_t;
  static BitmapPair expand(const uint16_t* value, uint32_t, __mmask32 mask) {
    __m512i v = _mm512_setzero_si512();
    asm("vpexpandw %1, %0 %{%2%}" : "+v"(v) : "m"(*reinterpret_cast<const uint16_t (*)[32]>(value)), "Yk"(mask));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
  }
  static BitmapPair ordered(const BitmapPair& p) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    return {_mm512_permutex2var_ps(p.low, low, p.high), _mm512_permutex2var_ps(p.low, high, p.high)};
  }
};

template <int kRows>
struct BitmapSums {
  BitmapSums<kRows - 1> above;
  __m512 low, high;
};
template <>
struct BitmapSums<0> {};

inline void clear(BitmapSums<0>&) {}
template <int kRows>
inline void clear(BitmapSums<kRows>& s) {
  clear(s.above);
  s.low = s.high = _mm512_setzero_ps();
}

inline void multiply_add(BitmapSums<0>&, const BitmapPair&, const float*, int64_t) {}
template <int kRows>
inline void multiply_add(BitmapSums<kRows>& s, const BitmapPair& w, const float* x, int64_t stride) {
  multiply_add(s.above, w, x, stride);
  const __m512 row = _mm512_set1_ps(x[(kRows - 1) * stride]);
  s.low = _mm512_fmadd_ps(w.low, row, s.low);
  s.high = _mm512_fmadd_ps(w.high, row, s.high);
}

template <class Values>
inline void write(const BitmapSums<0>&, float*, int64_t, int64_t) {}
template <class Values, int kRows>
inline void write(const BitmapSums<kRows>& s, float* y, int64_t stride, int64_t columns) {
  write<Values>(s.above, y, stride, columns);
  y += (kRows - 1) * stride;
  const __mmask32 part = columns >= 32 ? ~__mmask32{0} : (__mmask32{1} << columns) - 1;
  const BitmapPair sums = Values::ordered({s.low, s.high});
  _mm512_mask_storeu_ps(y, static_cast<__mmask16>(part), sums.low);
  _mm512_mask_storeu_ps(y + 16, static_cast<__mmask16>(part >> 16), sums.high);
}

// A block, and those side by side with it.
template <int kBlocks, int kRows, class Values>
struct BitmapBlocks {
  BitmapBlocks<kBlocks - 1, kRows, Values> before;
  BitmapSums<kRows> sums;
  const uint32_t* mask;
  const typename Values::T* value;
};
template <int kRows, class Values>
struct BitmapBlocks<0, kRows, Values> {};

template <int kRows, class Values>
inline void begin_blocks(BitmapBlocks<0, kRows, Values>&, const Pack&, int64_t) {}
template <int kBlocks, int kRows, class Values>
inline void begin_blocks(BitmapBlocks<kBlocks, kRows, Values>& s, const Pack& p, int64_t first) {
  begin_blocks(s.before, p, first);
  clear(s.sums);
  const int64_t b = first + kBlocks - 1;
  s.mask = p.mask + b * p.k;
  s.value = values<typename Values::T>(p) + at_most(p.offset[b], p.total);
}

template <int kRows, class Values>
inline void add_k(BitmapBlocks<0, kRows, Values>&, int64_t, const float*, int64_t) {}
template <int kBlocks, int kRows, class Values>
inline void add_k(BitmapBlocks<kBlocks, kRows, Values>& s, int64_t k, const float* x, int64_t stride) {
  add_k(s.before, k, x, stride);
  const uint32_t m = s.mask[k];
  __mmask32 mask;
  asm("kmovd %1, %0" : "=k"(mask) : "m"(s.mask[k]));
  __builtin_prefetch(reinterpret_cast<const char*>(s.value) +
                     kAheadBytes);  // a prefetch cannot fault: it may go beyond the pack
  const BitmapPair w = Values::expand(s.value, m, mask);
  s.value += __builtin_popcount(m);
  multiply_add(s.sums, w, x, stride);
}

// 8 steps go at most 256 on, and kSlack holds that and one read more.
template <int kRows, class Values>
inline void hold(BitmapBlocks<0, kRows, Values>&, const typename Values::T*) {}
template <int kBlocks, int kRows, class Values>
inline void hold(BitmapBlocks<kBlocks, kRows, Values>& s, const typename Values::T* limit) {
  hold(s.before, limit);
  s.value = s.value < limit ? s.value : limit;
}

template <int kRows, class Values>
inline void end_blocks(const BitmapBlocks<0, kRows, Values>&, const FewArgs&, int64_t) {}
template <int kBlocks, int kRows, class Values>
inline void end_blocks(const BitmapBlocks<kBlocks, kRows, Values>& s, const FewArgs& a, int64_t first) {
  end_blocks(s.before, a, first);
  const int64_t column = (first + kBlocks - 1) * kBitmapColumns;
  write<Values>(s.sums, a.y + column, a.y_stride, a.pack.n - column);
}

template <class Values, int kBlocks, int kRows>
void bitmap_blocks(const FewArgs& a) {
  const Pack& p = a.pack;
  const auto* const limit = values<typename Values::T>(p) + p.total;
  int64_t b = a.begin;
  for (; b + kBlocks <= a.end; b += kBlocks) {
    BitmapBlocks<kBlocks, kRows, Values> s;
    begin_blocks(s, p, b);
    int64_t k = 0;
    for (; k + 8 <= p.k; k += 8) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; ++i) add_k(s, k + i, a.x + k + i, a.x_stride);
      hold(s, limit);
    }
    for (; k < p.k; ++k) add_k(s, k, a.x + k, a.x_stride);
    end_blocks(s, a, b);
  }
  if constexpr (kBlocks > 1) {
    if (b < a.end) {
      FewArgs rest = a;
      rest.begin = b;
      bitmap_blocks<Values, kBlocks / 2, kRows>(rest);
    }
  }
}

template <class Values>
void bitmap_of(const FewArgs& a) {
  switch (a.rows) {
    case 1: return bitmap_blocks<Values, 2, 1>(a);
    case 2: return bitmap_blocks<Values, 2, 2>(a);
    case 3: return bitmap_blocks<Values, 2, 3>(a);
    default: return bitmap_blocks<Values, 2, 4>(a);
  }
}

void bitmap(const FewArgs& a) { bitmap_of<Float32Values>(a); }
void bitmap_bf16(const FewArgs& a) { bitmap_of<Bf16Values>(a); }
void bitmap_bf16_vbmi2(const FewArgs& a) { bitmap_of<Bf16Vbmi2Values>(a); }

}  // namespace
