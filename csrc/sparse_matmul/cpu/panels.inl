// The kernels of panels128, one body for every level; included behind kernels.inl. The level brings
//   Four(p).at<i>()   p[i] in all lanes, i from 0 to 3
namespace {

// How far ahead of their use values are asked for, in bytes: docs/kernels/sparse_matmul.md.
constexpr int64_t kPanelAhead = 2048;

// kVecs vectors of sums of one output.
template <int kVecs>
struct Vecs {
  Vecs<kVecs - 1> rest;
  Simd::F v;
};
template <>
struct Vecs<0> {};

inline void clear(Vecs<0>&) {}
template <int kVecs>
inline void clear(Vecs<kVecs>& s) {
  clear(s.rest);
  s.v = Simd::set1(0.0f);
}
inline void load(Vecs<0>&, const float*) {}
template <int kVecs>
inline void load(Vecs<kVecs>& s, const float* p) {
  load(s.rest, p);
  s.v = Simd::load(p + (kVecs - 1) * Simd::kWidth);
}
inline void multiply_add(Vecs<0>&, Simd::F, const float*) {}
template <int kVecs>
inline void multiply_add(Vecs<kVecs>& s, Simd::F w, const float* x) {
  multiply_add(s.rest, w, x);
  s.v = Simd::fma(w, Simd::load(x + (kVecs - 1) * Simd::kWidth), s.v);
}
inline void store(const Vecs<0>&, float*) {}
template <int kVecs>
inline void store(const Vecs<kVecs>& s, float* p) {
  store(s.rest, p);
  Simd::store(p + (kVecs - 1) * Simd::kWidth, s.v);
}

// Rows of a group that go side by side, for as many chains of additions: the last of them comes first in the nest.
template <int kVecs, int kRows>
struct Rows {
  Rows<kVecs, kRows - 1> before;
  Vecs<kVecs> sums;
};
template <int kVecs>
struct Rows<kVecs, 0> {};

template <int kVecs>
inline void clear(Rows<kVecs, 0>&) {}
template <int kVecs, int kRows>
inline void clear(Rows<kVecs, kRows>& r) {
  clear(r.before);
  clear(r.sums);
}

template <int kVecs>
constexpr int64_t kLanes = kVecs * Simd::kWidth;

template <int kVecs>
inline void load(Rows<kVecs, 0>&, const float*, const uint8_t*) {}
template <int kVecs, int kRows>
inline void load(Rows<kVecs, kRows>& r, const float* sums, const uint8_t* order) {
  load(r.before, sums, order);
  load(r.sums, sums + order[kRows - 1] * kLanes<kVecs>);
}

template <int kVecs>
inline void store(const Rows<kVecs, 0>&, float*, const uint8_t*) {}
template <int kVecs, int kRows>
inline void store(const Rows<kVecs, kRows>& r, float* sums, const uint8_t* order) {
  store(r.before, sums, order);
  store(r.sums, sums + order[kRows - 1] * kLanes<kVecs>);
}

// The indices of a step, in one load: a load for each would take turns with those of x (docs/kernels/sparse_matmul.md).
template <int kRows>
struct IndexWord {
  using Type = uint32_t;
};
template <>
struct IndexWord<8> {
  using Type = uint64_t;
};
template <int kRows>
struct Indices {
  typename IndexWord<kRows>::Type all = 0;
  explicit Indices(const uint8_t* p) { memcpy(&all, p, kRows); }

  // The row of the panel for row i of the group: a shift that leaves the index times the power of two in the length of
  // a row, and a mask.
  template <int kVecs, int i>
  const float* row(const float* panel) const {
    constexpr int64_t kBytes = kLanes<kVecs> * int64_t{sizeof(float)}, kPower = kBytes & -kBytes;
    constexpr int kLeft = __builtin_ctzll(kPower) - 8 * i;
    const auto shifted = kLeft >= 0 ? all << (kLeft >= 0 ? kLeft : 0) : all >> (kLeft < 0 ? -kLeft : 0);
    const int64_t offset = static_cast<int64_t>(shifted & (255 * kPower)) * (kBytes / kPower);
    return reinterpret_cast<const float*>(reinterpret_cast<const char*>(panel) + offset);
  }
};

// One step of rows kFrom to kFrom + kRows of a group: every row's weight times the row of the panel that its index
// says. `four` comes back as the weights of the last rows.
template <int kFrom, int kVecs, class Index>
inline void multiply_add(Rows<kVecs, 0>&, const float* value, const Index&, const float*, Four* four) {
  *four = Four(value + kFrom / 4 * 4);
}
template <int kFrom, int kVecs, class Index, int kRows>
inline void multiply_add(Rows<kVecs, kRows>& r, const float* value, const Index& index, const float* panel,
                         Four* four) {
  constexpr int kRow = kFrom + kRows - 1;
  multiply_add<kFrom>(r.before, value, index, panel, four);
  if (kRow % 4 == 0 && kRows > 1) *four = Four(value + kRow);
  multiply_add(r.sums, four->template at<kRow % 4>(), index.template row<kVecs, kRows - 1>(panel));
}

// A group in one block of k: all steps for kRows of its rows, then for the next ones.
template <int kVecs, int kRows, int kFrom = 0>
[[gnu::always_inline]] inline void walk(const float* value, const uint8_t* index, int64_t steps, const float* panel,
                                        const uint8_t* order, bool first, float* sums) {
  Rows<kVecs, kRows> rows;
  if (first)
    clear(rows);
  else
    load(rows, sums, order + kFrom);
  for (int64_t i = 0; i < steps; ++i) {
    const float* const step = value + i * kGroup;
    if (kFrom == 0) __builtin_prefetch(reinterpret_cast<const char*>(step) + kPanelAhead);  // may go beyond the pack
    Four four(step);
    multiply_add<kFrom>(rows, step, Indices<kRows>(index + i * kGroup + kFrom), panel, &four);
  }
  store(rows, sums, order + kFrom);
  if constexpr (kFrom + kRows < kGroup)
    walk<kVecs, kRows, kFrom + kRows>(value, index, steps, panel, order, first, sums);
}

// Panels of kVecs vectors; kRows of the 8 outputs of a group at a time. A block of the weight meets all panels before
// the next one: it is read from memory once.
template <int kVecs, int kRows>
void panel_lanes(const PanelArgs& a) {
  const Pack& p = a.pack;
  const int64_t width = panel_width(p.n), groups = width / kGroup, blocks = (p.k + kBlockK - 1) / kBlockK;
  const uint8_t* order = p.order + a.chunk * blocks * (width + groups);
  int64_t begin = at_most(p.offset[a.chunk], p.total), at = begin;
  if (blocks == 0) memset(a.sums, 0, static_cast<size_t>(a.count * kChunk * kLanes<kVecs>) * sizeof(float));
  for (int64_t b = 0; b < blocks; ++b, order += width + groups, begin = at)
    for (int64_t i = 0; i < a.count; ++i) {
      const float* const panel = a.panels + i * a.panel_stride + b * kBlockK * kLanes<kVecs>;
      float* const sums = a.sums + i * kChunk * kLanes<kVecs>;
      at = begin;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t steps = at_most(order[width + g], p.total - at);
        walk<kVecs, kRows>(p.value + at * kGroup, p.index + at * kGroup, steps, panel, order + g * kGroup, b == 0,
                           sums);
        at += steps;
      }
    }
}

}  // namespace
