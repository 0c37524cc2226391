// The kernels of panels128, one body for every level; included behind kernels.inl. The level brings
//   structs Weights      of 4 or 8 weights of float or bfloat16: Weights::Value, Weights::kCount,
//   Weights(p).at<i>()   p[i], widened, in all lanes, i from 0 to kCount - 1
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
// says. `weights` comes back as those of the last rows.
template <int kFrom, class Weights, int kVecs, class Index>
inline void multiply_add(Rows<kVecs, 0>&, const typename Weights::Value* value, const Index&, const float*,
                         Weights* weights) {
  *weights = Weights(value + kFrom / Weights::kCount * Weights::kCount);
}
template <int kFrom, class Weights, int kVecs, class Index, int kRows>
inline void multiply_add(Rows<kVecs, kRows>& r, const typename Weights::Value* value, const Index& index,
                         const float* panel, Weights* weights) {
  constexpr int kRow = kFrom + kRows - 1;
  multiply_add<kFrom>(r.before, value, index, panel, weights);
  if (kRow % Weights::kCount == 0 && kRows > 1) *weights = Weights(value + kRow);
  multiply_add(r.sums, weights->template at<kRow % Weights::kCount>(), index.template row<kVecs, kRows - 1>(panel));
}

// kRows of the rows of a group in one block of k, from kFrom on.
template <class Weights, int kVecs, int kRows, int kFrom>
[[gnu::always_inline]] inline void walk_rows(const typename Weights::Value* value, const uint8_t* index, int64_t steps,
                                             const float* panel, const uint8_t* order, bool first, float* sums) {
  Rows<kVecs, kRows> rows;
  if (first)
    clear(rows);
  else
    load(rows, sums, order + kFrom);
  for (int64_t i = 0; i < steps; ++i) {
    const typename Weights::Value* const step = value + i * kGroup;
    if (kFrom == 0) __builtin_prefetch(reinterpret_cast<const char*>(step) + kPanelAhead);  // may go beyond the pack
    Weights weights(step);
    multiply_add<kFrom>(rows, step, Indices<kRows>(index + i * kGroup + kFrom), panel, &weights);
  }
  store(rows, sums, order + kFrom);
}

// A group: all steps for kRows of its rows, then for the next ones.
template <class Weights, int kVecs, int kRows, int kFrom = 0>
[[gnu::always_inline]] inline void walk(const typename Weights::Value* value, const uint8_t* index, int64_t steps,
                                        const float* panel, const uint8_t* order, bool first, float* sums) {
  walk_rows<Weights, kVecs, kRows, kFrom>(value, index, steps, panel, order, first, sums);
  if constexpr (kFrom + kRows < kGroup)
    walk<Weights, kVecs, kRows, kFrom + kRows>(value, index, steps, panel, order, first, sums);
}

// A group whose rows differ much in length has more padding than weights: the few long rows of a pruned layer. Its rows
// go in pairs then (the last four of one vector together, for as many chains), each as far as its first one, which is
// the longest; behind a row's weights its last index is repeated.
constexpr int64_t kUnevenSteps = 8;
inline bool uneven(int64_t steps, int64_t next_steps) { return steps >= kUnevenSteps && 5 * next_steps < 3 * steps; }

// The steps of a row, by its indices (a value may be zero in training), at least one: it is padding if the row has no
// weight. Bisection without branches, which would be mispredicted.
inline int64_t row_steps(const uint8_t* index, int64_t steps) {
  int64_t own = 1, left = steps - 1;
  const auto ascends = [index](int64_t i) { return int64_t{index[i * kGroup] > index[(i - 1) * kGroup]}; };
  for (; left > 1; left -= left / 2) own += left / 2 & -ascends(own + left / 2 - 1);
  return left > 0 ? own + ascends(own) : own;
}

template <class Weights, int kVecs, int kFrom = 0>
[[gnu::noinline]] void walk_uneven(const typename Weights::Value* value, const uint8_t* index, int64_t steps,
                                   const float* panel, const uint8_t* order, bool first, float* sums) {
  constexpr int kRows = kVecs == 1 && kFrom == kGroup / 2 ? 4 : 2;
  const int64_t own = row_steps(index + kFrom, steps);
  walk_rows<Weights, kVecs, kRows, kFrom>(value, index, own, panel, order, first, sums);
  if constexpr (kFrom + kRows < kGroup)
    walk_uneven<Weights, kVecs, kFrom + kRows>(value, index, own, panel, order, first, sums);
}

// Panels of kVecs vectors; kRows of the 8 outputs of a group at a time. A block of the weight meets all panels before
// the next one: it is read from memory once.
template <int kVecs, int kRows, class Weights>
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
        const auto* const value = values<typename Weights::Value>(p) + at * kGroup;
        const uint8_t* const index = p.index + at * kGroup;
        at += steps;
        if constexpr (kRows > 1)  // the scalar level takes its time anyway, above all to compile
          if (__builtin_expect(g + 1 < groups && uneven(steps, order[width + g + 1]), 0)) {
            walk_uneven<Weights, kVecs>(value, index, steps, panel, order + g * kGroup, b == 0, sums);
            continue;
          }
        walk<Weights, kVecs, kRows>(value, index, steps, panel, order + g * kGroup, b == 0, sums);
      }
    }
}

}  // namespace
