// What blocks.inl and nm.inl need of a level, in plain C: 16 outputs side by side, and x spread over them.

namespace {

struct Out16 {
  float v[16];
  static Out16 zero() { return {}; }
  static Out16 load(const float* p) {
    Out16 l;
    memcpy(l.v, p, sizeof l.v);
    return l;
  }
  void store(float* p) const { memcpy(p, v, sizeof v); }
  static Out16 multiply_add(const Out16& w, const Out16& x, const Out16& s) {
    Out16 l;
    for (int i = 0; i < 16; ++i) l.v[i] = Simd::fma(w.v[i], x.v[i], s.v[i]);
    return l;
  }
};

// The x of the blocks of a step, R outputs x C k each; x + k[place] is where a block's begin. at<c>(): x of column c of
// its block in each lane. R consecutive lanes have the same block.
template <int kR>
struct BlockX {
  const float* x[16 / kR];
  BlockX(const float* p, const uint16_t* k) {
    for (int g = 0; g < 16 / kR; ++g) x[g] = p + k[g];
  }
  template <int kC>
  Out16 at() const {
    Out16 l;
    for (int i = 0; i < 16; ++i) l.v[i] = x[i / kR][kC];
    return l;
  }
};

// Words of positions, lane by lane; next() drops one position.
struct Positions {
  uint32_t words[16];
  Positions() = default;
  explicit Positions(const float* p) { memcpy(words, p, sizeof words); }
  template <int kBits>
  Positions next() const {
    Positions n;
    for (int i = 0; i < 16; ++i) n.words[i] = words[i] >> kBits;
    return n;
  }
};

// The x of a group of M k. pick(): in each lane the one that the lowest bits of its word say.
template <int kM>
struct NmX {
  const float* x;
  explicit NmX(const float* p) : x(p) {}
  Out16 pick(const Positions& at) const {
    Out16 l;
    for (int i = 0; i < 16; ++i) l.v[i] = x[at.words[i] & (kM - 1)];
    return l;
  }
};

constexpr int kBlockSide = 2;                           // slices side by side: 1 row of x
constexpr int kNmSide = 1, kNmSide2 = 1, kNmSide3 = 1;  // the same for 1, 2 and 3 or 4 rows
constexpr bool kNmWide = false;                         // 4 rows at once
constexpr int64_t kNmAhead = 1024;                      // floats

// The tiles of a panel: vectors, outputs, places side by side; kVecs1, kSide1 for blocks of one output.
template <int kLanes>
struct BlockPanel {
  static constexpr int kVecs = 8, kOut = 4, kSide4 = 1, kVecs1 = 8, kSide1 = 1;
};

template <int kLanes>
struct NmPanel {
  static constexpr int kVecs = 8, kSide = 1;
};

}  // namespace
