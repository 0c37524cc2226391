// The kernels of panels128, one body for every level; included behind kernels.inl. The level brings
//   Four(p).at<i>()   p[i] in all lanes, i from 0 to 3
namespace {

// How far ahead of their use values are asked for, in bytes: docs/kernels/sparse_matmul.md.
constexpr int64_t kPanelAhead = 4096;

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

// One step: every row's weight times the row of the panel that its index says. `four` comes back as the weights of the
// last rows.
template <int kVecs>
inline void multiply_add(Rows<kVecs, 0>&, const float* value, const uint8_t*, const float*, Four* four) {
  *four = Four(value);
}
template <int kVecs, int kRows>
inline void multiply_add(Rows<kVecs, kRows>& r, const float* value, const uint8_t* index, const float* panel,
                         Four* four) {
  multiply_add(r.before, value, index, panel, four);
  if (kRows == 5) *four = Four(value + 4);
  multiply_add(r.sums, four->template at<(kRows - 1) % 4>(), panel + index[kRows - 1] * kLanes<kVecs>);
}

// kRows rows of a group, whose values and indices lie kGroup apart, for all steps.
template <int kVecs, int kRows, bool kAhead>
[[gnu::always_inline]] inline void walk(const float* value, const uint8_t* index, int64_t steps, const float* panel, const uint8_t* order,
                 bool first, float* sums) {
  Rows<kVecs, kRows> rows;
  if (first)
    clear(rows);
  else
    load(rows, sums, order);
  for (const float* const end = value + steps * kGroup; value != end; value += kGroup, index += kGroup) {
    if (kAhead) __builtin_prefetch(reinterpret_cast<const char*>(value) + kPanelAhead);  // may go beyond the pack
    Four four(value);
    multiply_add(rows, value, index, panel, &four);
  }
  store(rows, sums, order);
}

// A panel of kVecs vectors; kRows of the 8 outputs of a group at a time.
template <int kVecs, int kRows>
void panel_lanes(const PanelArgs& a) {
  const Pack& p = a.pack;
  const int64_t width = panel_width(p.n), groups = width / kGroup, blocks = (p.k + kBlockK - 1) / kBlockK;
  const uint8_t* order = p.order + a.chunk * blocks * (width + groups);
  int64_t at = at_most(p.offset[a.chunk], p.total);
  if (blocks == 0) memset(a.sums, 0, static_cast<size_t>(width * kLanes<kVecs>) * sizeof(float));
  for (int64_t b = 0; b < blocks; ++b, order += groups) {
    const float* const panel = a.panel + b * kBlockK * kLanes<kVecs>;
    const uint8_t* const end = order + width;
    for (const uint8_t* count = end; order != end; order += kGroup, ++count) {
      const int64_t steps = at_most(*count, p.total - at);
      const float* const value = p.value + at * kGroup;
      const uint8_t* const index = p.index + at * kGroup;
      walk<kVecs, kRows, true>(value, index, steps, panel, order, b == 0, a.sums);
      for (int r = kRows; r < kGroup; r += kRows)
        walk<kVecs, kRows, false>(value + r, index + r, steps, panel, order + r, b == 0, a.sums);
      at += steps;
    }
  }
}

}  // namespace
