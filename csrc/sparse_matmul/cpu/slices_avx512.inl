// What blocks.inl and nm.inl need of AVX-512: 16 outputs as the lanes of one zmm, and x spread over them.
// cpu/slices_scalar.inl says what each type means.

namespace {

struct Out16 {
  __m512 v;
  static Out16 zero() { return {_mm512_setzero_ps()}; }
  static Out16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  static Out16 multiply_add(const Out16& w, const Out16& x, const Out16& s) { return {_mm512_fmadd_ps(w.v, x.v, s.v)}; }
};

template <int kR>
struct BlockX;

template <>
struct BlockX<16> {
  const float* x;
  BlockX(const float* p, const uint16_t* k) : x(p + *k) {}
  template <int kC>
  Out16 at() const {
    return {_mm512_set1_ps(x[kC])};
  }
};

template <>
struct BlockX<8> {
  __m512 x;
  BlockX(const float* p, const uint16_t* k)
      : x(_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(p + k[0])), _mm256_loadu_ps(p + k[1]), 1)) {}
  template <int kC>
  Out16 at() const {
    constexpr int kHigh = 8 + kC;
    return {_mm512_permutexvar_ps(
        _mm512_setr_epi32(kC, kC, kC, kC, kC, kC, kC, kC, kHigh, kHigh, kHigh, kHigh, kHigh, kHigh, kHigh, kHigh), x)};
  }
};

// Four x of each of four places.
inline __m512 four_quads(const float* a, const float* b, const float* c, const float* d) {
  const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a)), _mm_loadu_ps(b), 1);
  const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(c)), _mm_loadu_ps(d), 1);
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

template <>
struct BlockX<4> {
  __m512 x;
  BlockX(const float* p, const uint16_t* k) : x(four_quads(p + k[0], p + k[1], p + k[2], p + k[3])) {}
  template <int kC>
  Out16 at() const {
    return {_mm512_permute_ps(x, kC * 0x55)};
  }
};

template <>
struct BlockX<1> {
  __m512 x0, x1, x2, x3;
  BlockX(const float* p, const uint16_t* k) {
    const auto row = [&](int j) { return four_quads(p + k[j], p + k[4 + j], p + k[8 + j], p + k[12 + j]); };
    const auto low = [](__m512 a, __m512 b) {
      return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    const auto high = [](__m512 a, __m512 b) {
      return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    const __m512 a = row(0), b = row(1), c = row(2), d = row(3);
    const __m512 ab01 = _mm512_unpacklo_ps(a, b), ab23 = _mm512_unpackhi_ps(a, b);
    const __m512 cd01 = _mm512_unpacklo_ps(c, d), cd23 = _mm512_unpackhi_ps(c, d);
    x0 = low(ab01, cd01);
    x1 = high(ab01, cd01);
    x2 = low(ab23, cd23);
    x3 = high(ab23, cd23);
  }
  template <int kC>
  Out16 at() const {
    return {kC == 0 ? x0 : kC == 1 ? x1 : kC == 2 ? x2 : x3};
  }
};

struct Positions {
  __m512i words;
  Positions() = default;
  explicit Positions(const float* p) : words(_mm512_loadu_si512(p)) {}
  template <int kBits>
  Positions next() const {
    Positions n;
    n.words = _mm512_srli_epi32(words, kBits);
    return n;
  }
};

template <int kM>
struct NmX;
template <>
struct NmX<4> {
  __m512 x;
  explicit NmX(const float* p) : x(_mm512_broadcast_f32x4(_mm_loadu_ps(p))) {}
  Out16 pick(const Positions& at) const { return {_mm512_permutevar_ps(x, at.words)}; }
};
template <>
struct NmX<8> {
  __m512 x;  // bit 3 of a lane's control chooses between two equal halves
  explicit NmX(const float* p) : x(_mm512_broadcast_f32x8(_mm256_loadu_ps(p))) {}
  Out16 pick(const Positions& at) const { return {_mm512_permutexvar_ps(at.words, x)}; }
};

constexpr int kBlockSide = 4;                           // slices side by side: 1 row of x
constexpr int kNmSide = 4, kNmSide2 = 4, kNmSide3 = 2;  // the same for 1, 2 and 3 or 4 rows
constexpr bool kNmWide = true;                          // up to 8 rows at once
constexpr int64_t kNmAhead = 1024;                      // floats

template <int kLanes>
struct BlockPanel;
template <>
struct BlockPanel<16> {
  static constexpr int kVecs = 1, kOut = 8, kSide4 = 4, kVecs1 = 1, kSide1 = 8;
};
template <>
struct BlockPanel<32> {
  static constexpr int kVecs = 2, kOut = 8, kSide4 = 1, kVecs1 = 2, kSide1 = 4;
};
template <>
struct BlockPanel<64> {
  static constexpr int kVecs = 4, kOut = 4, kSide4 = 1, kVecs1 = 4, kSide1 = 2;
};

template <int kLanes>
struct NmPanel {
  static constexpr int kVecs = kLanes / 16, kSide = kLanes == 64 ? 2 : kLanes == 32 ? 4 : 8;
};

}  // namespace
