// What blocks.inl and nm.inl need of AVX2: 16 outputs as the lanes of two ymm, and x spread over them.
// cpu/slices_scalar.inl says what each type means.

namespace {

struct Out16 {
  __m256 a, b;
  static Out16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Out16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }
  static Out16 multiply_add(const Out16& w, const Out16& x, const Out16& s) {
    return {_mm256_fmadd_ps(w.a, x.a, s.a), _mm256_fmadd_ps(w.b, x.b, s.b)};
  }
};

template <int kR>
struct BlockX;

template <>
struct BlockX<16> {
  const float* x;
  BlockX(const float* p, const uint16_t* k) : x(p + *k) {}
  template <int kC>
  Out16 at() const {
    const __m256 v = _mm256_broadcast_ss(x + kC);
    return {v, v};
  }
};

template <>
struct BlockX<8> {
  const float *x0, *x1;
  BlockX(const float* p, const uint16_t* k) : x0(p + k[0]), x1(p + k[1]) {}
  template <int kC>
  Out16 at() const {
    return {_mm256_broadcast_ss(x0 + kC), _mm256_broadcast_ss(x1 + kC)};
  }
};

inline __m256 two_quads(const float* a, const float* b) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a)), _mm_loadu_ps(b), 1);
}

template <>
struct BlockX<4> {
  __m256 a, b;
  BlockX(const float* p, const uint16_t* k) : a(two_quads(p + k[0], p + k[1])), b(two_quads(p + k[2], p + k[3])) {}
  template <int kC>
  Out16 at() const {
    return {_mm256_permute_ps(a, kC * 0x55), _mm256_permute_ps(b, kC * 0x55)};
  }
};

// Lane i of x0 .. x3: x of the i-th of eight places.
struct Transposed8 {
  __m256 x0, x1, x2, x3;
  Transposed8(const float* p, const uint16_t* k) {
    const auto row = [&](int j) { return two_quads(p + k[j], p + k[4 + j]); };
    const auto low = [](__m256 a, __m256 b) {
      return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
    };
    const auto high = [](__m256 a, __m256 b) {
      return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
    };
    const __m256 a = row(0), b = row(1), c = row(2), d = row(3);
    const __m256 ab01 = _mm256_unpacklo_ps(a, b), ab23 = _mm256_unpackhi_ps(a, b);
    const __m256 cd01 = _mm256_unpacklo_ps(c, d), cd23 = _mm256_unpackhi_ps(c, d);
    x0 = low(ab01, cd01);
    x1 = high(ab01, cd01);
    x2 = low(ab23, cd23);
    x3 = high(ab23, cd23);
  }
  template <int kC>
  __m256 at() const {
    return kC == 0 ? x0 : kC == 1 ? x1 : kC == 2 ? x2 : x3;
  }
};

template <>
struct BlockX<1> {
  Transposed8 a, b;
  BlockX(const float* p, const uint16_t* k) : a(p, k), b(p, k + 8) {}
  template <int kC>
  Out16 at() const {
    return {a.template at<kC>(), b.template at<kC>()};
  }
};

struct Positions {
  __m256i a, b;
  Positions() = default;
  explicit Positions(const float* p)
      : a(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
        b(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))) {}
  template <int kBits>
  Positions next() const {
    Positions n;
    n.a = _mm256_srli_epi32(a, kBits);
    n.b = _mm256_srli_epi32(b, kBits);
    return n;
  }
};

template <int kM>
struct NmX;
template <>
struct NmX<4> {
  __m256 x;
  explicit NmX(const float* p) : x(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))) {}
  Out16 pick(const Positions& at) const { return {_mm256_permutevar_ps(x, at.a), _mm256_permutevar_ps(x, at.b)}; }
};
template <>
struct NmX<8> {
  __m256 x;
  explicit NmX(const float* p) : x(_mm256_loadu_ps(p)) {}
  Out16 pick(const Positions& at) const {
    return {_mm256_permutevar8x32_ps(x, at.a), _mm256_permutevar8x32_ps(x, at.b)};
  }
};

constexpr int kBlockSide = 2;                           // slices side by side: 1 row of x
constexpr int kNmSide = 2, kNmSide2 = 1, kNmSide3 = 1;  // the same for 1, 2 and 3 or 4 rows
constexpr bool kNmWide = false;                         // 4 rows at once
constexpr int64_t kNmAhead = 1024;                      // floats

template <int kLanes>
struct BlockPanel {
  static constexpr int kVecs = kLanes == 8 ? 1 : 2, kOut = kLanes == 8 ? 8 : 4, kSide4 = kLanes == 8 ? 2 : 1;
  static constexpr int kVecs1 = kLanes == 8 ? 1 : kLanes == 16 ? 2 : kLanes == 32 ? 4 : 8, kSide1 = 8 / kVecs1;
};

template <int kLanes>
struct NmPanel {
  static constexpr int kVecs = kLanes / 8, kSide = 8 / kVecs;
};

}  // namespace
