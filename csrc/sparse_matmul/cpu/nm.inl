// The kernels of nm packs (formats/nm.h), one body for every level; behind kernels.inl and slices_<level>.inl.
// Idea     up to 8 rows: 16 outputs are lanes. The M values of x of a group stand in every 128 (256) bits; a
// permutation
//          whose control is the word of positions picks one for each lane (it looks at the low bits alone), and a shift
//          brings the next position: no mask, no count, one value a lane in every step. More rows: rows of x are lanes,
//          two bits of the word say which row of the panel a weight meets; every output has as many.
// Tails    outputs: partly stored; k: x ends in zeros; rows: smaller instances.

namespace {

template <int kN, int kM>
struct NmShape {
  static constexpr int kBits = kM == 4 ? 2 : 4;
  static constexpr int kValues = 32 / kBits, kGroups = kValues / kN, kWidth = kGroups * kM;
  static constexpr int64_t kFloats = kSlice * (1 + kValues);  // of a run
};

// The x of a group, for each row.
template <int kM, int kRows>
struct GroupX {
  GroupX<kM, kRows - 1> above;
  NmX<kM> x;
  GroupX(const float* p, int64_t stride) : above(p, stride), x(p + (kRows - 1) * stride) {}
};
template <int kM>
struct GroupX<kM, 0> {
  GroupX(const float*, int64_t) {}
};

template <int kM>
inline void add_value(Slice<Out16, 0>&, const Out16&, const GroupX<kM, 0>&, const Positions&) {}
template <int kM, int kRows>
inline void add_value(Slice<Out16, kRows>& s, const Out16& w, const GroupX<kM, kRows>& x, const Positions& at) {
  add_value(s.above, w, x.above, at);
  s.sum = Out16::multiply_add(w, x.x.pick(at), s.sum);
}

// Slices that are walked side by side.
template <int kRows, int kSide>
struct NmSlices {
  NmSlices<kRows, kSide - 1> before;
  Slice<Out16, kRows> sums;
  Positions at;
  const float* run;
};
template <int kRows>
struct NmSlices<kRows, 0> {};

template <int kRows>
inline void begin_nm(NmSlices<kRows, 0>&, const float*, int64_t) {}
template <int kRows, int kSide>
inline void begin_nm(NmSlices<kRows, kSide>& s, const float* run, int64_t floats) {
  begin_nm(s.before, run, floats);
  clear(s.sums);
  s.run = run + (kSide - 1) * floats;
}
template <int kRows>
inline void load_words(NmSlices<kRows, 0>&, int64_t) {}
template <int kRows, int kSide>
inline void load_words(NmSlices<kRows, kSide>& s, int64_t at) {
  load_words(s.before, at);
  s.at = Positions(s.run + at);
}
template <int kBits, int kM, int kRows>
inline void add_values(NmSlices<kRows, 0>&, int64_t, const GroupX<kM, kRows>&) {}
template <int kBits, int kM, int kRows, int kSide>
inline void add_values(NmSlices<kRows, kSide>& s, int64_t at, const GroupX<kM, kRows>& x) {
  add_values<kBits>(s.before, at, x);
  __builtin_prefetch(s.run + at + kNmAhead);
  add_value(s.sums, Out16::load(s.run + at), x, s.at);
  s.at = s.at.template next<kBits>();
}
template <int kRows>
inline void write_nm(const NmSlices<kRows, 0>&, const FewArgs&, int64_t) {}
template <int kRows, int kSide>
inline void write_nm(const NmSlices<kRows, kSide>& s, const FewArgs& a, int64_t slice) {
  write_nm(s.before, a, slice);
  const int64_t column = (slice + kSide - 1) * kSlice;
  write(s.sums, a.y + column, a.y_stride, a.pack.n - column);
}

template <int kN, int kM, int kRows, int kSide>
inline void nm_side(const FewArgs& a, int64_t slice) {
  using S = NmShape<kN, kM>;
  const int64_t words = (a.pack.k + S::kWidth - 1) / S::kWidth, floats = words * S::kFloats;
  NmSlices<kRows, kSide> s;
  begin_nm(s, reinterpret_cast<const float*>(a.pack.step) + slice * floats, floats);
  const float* x = a.x;
  int64_t at = 0;
  for (int64_t w = 0; w < words; ++w) {
    load_words(s, at);
    at += kSlice;
#pragma GCC unroll 2
    for (int g = 0; g < S::kGroups; ++g, x += kM) {
      const GroupX<kM, kRows> group(x, a.x_stride);
#pragma GCC unroll 4
      for (int i = 0; i < kN; ++i, at += kSlice) add_values<S::kBits>(s, at, group);
    }
  }
  write_nm(s, a, slice);
}

template <int kN, int kM, int kRows, int kSide>
void nm_rows(const FewArgs& a) {
  int64_t slice = a.begin;
  for (; slice + kSide <= a.end; slice += kSide) nm_side<kN, kM, kRows, kSide>(a, slice);
  for (; slice < a.end; ++slice) nm_side<kN, kM, kRows, 1>(a, slice);
}

template <int kN, int kM>
void nm_slices_of(const FewArgs& a) {
  if constexpr (kNmWide) {
    switch (a.rows) {
      case 5: return nm_rows<kN, kM, 5, 2>(a);
      case 6: return nm_rows<kN, kM, 6, 2>(a);
      case 7: return nm_rows<kN, kM, 7, 2>(a);
      case 8: return nm_rows<kN, kM, 8, 2>(a);
    }
  } else if (a.rows > 4) {
    FewArgs part = a;
    part.rows = 4;
    nm_slices_of<kN, kM>(part);
    part.rows = a.rows - 4;
    part.x += 4 * a.x_stride;
    part.y += 4 * a.y_stride;
    return nm_slices_of<kN, kM>(part);
  }
  switch (a.rows) {
    case 1: return nm_rows<kN, kM, 1, kNmSide>(a);
    case 2: return nm_rows<kN, kM, 2, kNmSide2>(a);
    case 3: return nm_rows<kN, kM, 3, kNmSide3>(a);
    default: return nm_rows<kN, kM, 4, kNmSide3>(a);
  }
}

void nm_slices(const FewArgs& a) {
  switch (a.pack.block) {
    case 0x0104: return nm_slices_of<1, 4>(a);
    case 0x0204: return nm_slices_of<2, 4>(a);
    default: return nm_slices_of<4, 8>(a);
  }
}

// --- Many rows -------------------------------------------------------------------------------------------------------

// Outputs that are walked side by side: their positions and sums.
template <int kVecs, int kSide>
struct NmOutputs {
  NmOutputs<kVecs, kSide - 1> before;
  Vecs<kVecs> sums;
  uint64_t word;
};
template <int kVecs>
struct NmOutputs<kVecs, 0> {};

template <int kVecs>
inline void load_sums(NmOutputs<kVecs, 0>&, const float*, int64_t) {}
template <int kVecs, int kSide>
inline void load_sums(NmOutputs<kVecs, kSide>& s, const float* sums, int64_t stride) {
  load_sums(s.before, sums, stride);
  load(s.sums, sums + (kSide - 1) * stride);
}
template <int kVecs>
inline void store_sums(const NmOutputs<kVecs, 0>&, float*, int64_t) {}
template <int kVecs, int kSide>
inline void store_sums(const NmOutputs<kVecs, kSide>& s, float* sums, int64_t stride) {
  store_sums(s.before, sums, stride);
  store(s.sums, sums + (kSide - 1) * stride);
}
// kShift: the words come multiplied by it, so that a position is at once a distance in the panel.
template <int kShift, int kVecs>
inline void load_words(NmOutputs<kVecs, 0>&, const uint32_t*) {}
template <int kShift, int kVecs, int kSide>
inline void load_words(NmOutputs<kVecs, kSide>& s, const uint32_t* words) {
  load_words<kShift>(s.before, words);
  s.word = uint64_t{words[kSide - 1]} * kShift;
}
template <int kM, int kBits, int kLanes, int kVecs>
inline void add_row(NmOutputs<kVecs, 0>&, const float*, const float*) {}
template <int kM, int kBits, int kLanes, int kVecs, int kSide>
inline void add_row(NmOutputs<kVecs, kSide>& s, const float* value, const float* x) {
  add_row<kM, kBits, kLanes>(s.before, value, x);
  const uint64_t distance = s.word & ((kM - 1) * uint64_t{kLanes} * sizeof(float));
  multiply_add(s.sums, Simd::set1(value[kSide - 1]),
               reinterpret_cast<const float*>(reinterpret_cast<const char*>(x) + distance));
  s.word >>= kBits;
}

// A panel of kLanes rows in parts of kVecs vectors, kSide outputs at a time.
template <int kN, int kM, int kLanes, int kVecs, int kSide>
void nm_panel_lanes(const TileArgs& a) {
  using S = NmShape<kN, kM>;
  static_assert(kTileK % S::kWidth == 0 && kSlice % kSide == 0 && kLanes % (kVecs * Simd::kWidth) == 0, "whole tiles");
  const Pack& p = a.pack;
  const int64_t words = (p.k + S::kWidth - 1) / S::kWidth, all = (p.n + kSlice - 1) / kSlice;
  const int64_t width = tile_width(p.n), slices = width / kSlice;
  const int64_t begin = a.chunk * slices, end = begin + slices < all ? begin + slices : all;
  memset(a.sums, 0, static_cast<size_t>(width * kLanes) * sizeof(float));
  for (int64_t first = 0; first < words; first += kTileK / S::kWidth) {
    const int64_t last = first + kTileK / S::kWidth < words ? first + kTileK / S::kWidth : words;
    for (int64_t slice = begin; slice < end; ++slice) {
      // The next slice's runs lie elsewhere: its lines are asked for evenly under this one's.
      const float* const next = reinterpret_cast<const float*>(p.step) +
                                (slice + 1 < end ? (slice + 1) * words + first : begin * words + last) * S::kFloats;
      for (int64_t column = 0; column < kLanes; column += kVecs * Simd::kWidth)
        for (int64_t output = 0; output < kSlice; output += kSide) {
          float* const sums = a.sums + ((slice - begin) * kSlice + output) * kLanes + column;
          const float* ahead = next + output * (S::kFloats / kSlice);
          const float* run = reinterpret_cast<const float*>(p.step) + (slice * words + first) * S::kFloats + output;
          const float* x = a.panel + first * S::kWidth * kLanes + column;
          NmOutputs<kVecs, kSide> s;
          load_sums(s, sums, kLanes);
          for (int64_t w = first; w < last; ++w) {
            for (int line = 0; line <= S::kValues * kSide / kSlice; ++line) __builtin_prefetch(ahead + line * kSlice);
            ahead += S::kFloats;
            load_words<kLanes* static_cast<int>(sizeof(float))>(s, reinterpret_cast<const uint32_t*>(run));
            run += kSlice;
#pragma GCC unroll 16
            for (int g = 0; g < S::kGroups; ++g, x += kM * kLanes)
#pragma GCC unroll 4
              for (int i = 0; i < kN; ++i, run += kSlice) add_row<kM, S::kBits, kLanes>(s, run, x);
          }
          store_sums(s, sums, kLanes);
        }
    }
  }
}

template <int kLanes>
void nm_panel_of(const TileArgs& a) {
  using P = NmPanel<kLanes>;
  switch (a.pack.block) {
    case 0x0104: return nm_panel_lanes<1, 4, kLanes, P::kVecs, P::kSide>(a);
    case 0x0204: return nm_panel_lanes<2, 4, kLanes, P::kVecs, P::kSide>(a);
    default: return nm_panel_lanes<4, 8, kLanes, P::kVecs, P::kSide>(a);
  }
}

}  // namespace
