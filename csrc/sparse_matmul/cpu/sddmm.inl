// The body of Kernels::sample (training.h): dot products of rows of two panels, where a structure has a value. Before
// this the level brings  struct Dot:
//   F, kWidth                  a vector of so many lanes, 8 or 16
//   load, mul, fma             of F
//   Half                       four sums of 4 of the 16 lanes each, or of 8
//   fold(a, b, c, d)           F -> Half, in the order that training.h states
//   sum(Half) / sum(Half, Half)  -> Four: of all lanes (kWidth 16: one half; 8: lanes 0 to 7, then 8 to 15)
//   store(float* p, Four), add(float* p, Four): four values; with a third argument n only the first n of them, 1 to 3
#include "../sparse_matmul.h"
#include "../training.h"

namespace {

// Every sixteenth group of the lanes that one vector holds, kVecs of them.
template <int kVecs>
struct Lane {
  Lane<kVecs - 1> before;
  Dot::F v;
};
template <>
struct Lane<0> {};

inline void load_lanes(Lane<0>&, const float*) {}
template <int kVecs>
inline void load_lanes(Lane<kVecs>& l, const float* p) {
  load_lanes(l.before, p);
  l.v = Dot::load(p + (kVecs - 1) * 16);
}

inline Dot::F dot_lanes(const Lane<1>& l, const float* q) { return Dot::mul(l.v, Dot::load(q)); }
template <int kVecs>
inline Dot::F dot_lanes(const Lane<kVecs>& l, const float* q) {
  const Dot::F sum = dot_lanes(l.before, q);
  return Dot::fma(l.v, Dot::load(q + (kVecs - 1) * 16), sum);
}

template <int kVecs>
inline Dot::Half dot4(const Lane<kVecs>& l, const float* a, const float* b, const float* c, const float* d) {
  return Dot::fold(dot_lanes(l, a), dot_lanes(l, b), dot_lanes(l, c), dot_lanes(l, d));
}

// The row of p, whole.
template <int kVecs, int kWidth>
struct Row;
template <int kVecs>
struct Row<kVecs, 16> {
  Lane<kVecs> all;
  explicit Row(const float* p) { load_lanes(all, p); }
  Dot::Four dot(const float* a, const float* b, const float* c, const float* d) const {
    return Dot::sum(dot4(all, a, b, c, d));
  }
};
template <int kVecs>
struct Row<kVecs, 8> {
  Lane<kVecs> low, high;
  explicit Row(const float* p) {
    load_lanes(low, p);
    load_lanes(high, p + 8);
  }
  Dot::Four dot(const float* a, const float* b, const float* c, const float* d) const {
    const Dot::Half first = dot4(low, a, b, c, d);
    return Dot::sum(first, dot4(high, a + 8, b + 8, c + 8, d + 8));
  }
};

// How many rows ahead the row of p is asked for: they come in the order of their counts, which no prefetcher foresees.
constexpr int64_t kRowsAhead = 2;

template <int kVecs>
inline void prefetch_row(const float* p) {
  for (int i = 0; i < kVecs; ++i) __builtin_prefetch(p + i * 16);
}

template <int kVecs, bool kAdd>
void sample_rows(const SampleArgs& a) {
  constexpr int64_t kLanes = kVecs * 16;
  for (int64_t at = 0; at < kSampleOutputs; ++at) {
    int64_t count = a.order[kSampleOutputs + at];
    if (count == 0) break;  // descending: only zeros follow
    const int64_t start = a.start[at] < a.nonzeros ? static_cast<int64_t>(a.start[at]) : a.nonzeros;
    count = count < a.nonzeros - start ? count : a.nonzeros - start;
    const uint8_t* index = a.index + start;
    float* out = a.values + start;
    prefetch_row<kVecs>(a.p + a.order[at + kRowsAhead] * kLanes);  // at the end a count: another row's, harmless
    const Row<kVecs, Dot::kWidth> row(a.p + a.order[at] * kLanes);
    const auto four = [&](const uint8_t* i) {
      return row.dot(a.q + i[0] * kLanes, a.q + i[1] * kLanes, a.q + i[2] * kLanes, a.q + i[3] * kLanes);
    };
    for (; count >= 4; count -= 4, index += 4, out += 4) {
      if (kAdd)
        Dot::add(out, four(index));
      else
        Dot::store(out, four(index));
    }
    if (count > 0) {  // the indices behind the last one are another row's: read, and not used
      if (kAdd)
        Dot::add(out, four(index), static_cast<int>(count));
      else
        Dot::store(out, four(index), static_cast<int>(count));
    }
  }
}

template <int kVecs>
void sample_lanes(const SampleArgs& a) {
  return a.add ? sample_rows<kVecs, true>(a) : sample_rows<kVecs, false>(a);
}

void sample_block(const SampleArgs& a) {
  switch (a.lanes) {
    case 16: return sample_lanes<1>(a);
    case 32: return sample_lanes<2>(a);
    default: return sample_lanes<4>(a);
  }
}

}  // namespace
