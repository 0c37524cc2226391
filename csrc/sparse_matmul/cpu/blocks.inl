// The kernels of blocks packs (formats/blocks.h), one body for every level; behind kernels.inl and slices_<level>.inl.
// Idea     up to 4 rows: the 16 outputs of a slice are lanes, each place of a step brings its own x (BlockX), and the
//          values are a memory operand. More rows: rows of x are lanes; a tile of 4 or 8 outputs x kVecs vectors meets
//          a row of the panel that was loaded once, so one load serves as many fused multiply-adds.
// Tails    outputs: partly stored, rows of blocks beyond N have no blocks; k: x ends in zeros; rows: smaller instances.

namespace {

// gcc gives up on inlining a part of such a nest, and passes vectors through memory then.
#define BLOCKS_INLINE __attribute__((always_inline)) inline

// A step: the blocks that stand in it meet the x of each row. Narrow ones row by row; of wide ones each column's values
// are loaded once for all rows.
template <int kC, int kAt = 0, class X>
BLOCKS_INLINE void add_row_of_x(Out16& sum, const X& x, const float* value) {
  if constexpr (kAt < kC) {
    sum = Out16::multiply_add(Out16::load(value + kAt * kSlice), x.template at<kAt>(), sum);
    add_row_of_x<kC, kAt + 1>(sum, x, value);
  }
}

template <int kR, int kRows>
struct BlockXs {
  BlockXs<kR, kRows - 1> above;
  BlockX<kR> x;
  BLOCKS_INLINE BlockXs(const float* p, int64_t stride, const uint16_t* first_k)
      : above(p, stride, first_k), x(p + (kRows - 1) * stride, first_k) {}
};
template <int kR>
struct BlockXs<kR, 0> {
  BLOCKS_INLINE BlockXs(const float*, int64_t, const uint16_t*) {}
};
template <int kAt, int kR>
BLOCKS_INLINE void add_column(Slice<Out16, 0>&, const Out16&, const BlockXs<kR, 0>&) {}
template <int kAt, int kR, int kRows>
BLOCKS_INLINE void add_column(Slice<Out16, kRows>& s, const Out16& w, const BlockXs<kR, kRows>& x) {
  add_column<kAt>(s.above, w, x.above);
  s.sum = Out16::multiply_add(w, x.x.template at<kAt>(), s.sum);
}
template <int kC, int kAt = 0, int kR, int kRows>
BLOCKS_INLINE void add_columns(Slice<Out16, kRows>& s, const float* value, const BlockXs<kR, kRows>& x) {
  if constexpr (kAt < kC) {
    add_column<kAt>(s, Out16::load(value + kAt * kSlice), x);
    add_columns<kC, kAt + 1>(s, value, x);
  }
}

template <int kR, int kC>
BLOCKS_INLINE void add_step(Slice<Out16, 0>&, const uint16_t*, const float*, const float*, int64_t) {}
template <int kR, int kC, int kRows>
BLOCKS_INLINE void add_step(Slice<Out16, kRows>& s, const uint16_t* first_k, const float* value, const float* x,
                            int64_t stride) {
  if constexpr (kC > 4) {
    add_columns<kC>(s, value, BlockXs<kR, kRows>(x, stride, first_k));
  } else {
    add_step<kR, kC>(s.above, first_k, value, x, stride);
    add_row_of_x<kC>(s.sum, BlockX<kR>(x + (kRows - 1) * stride, first_k), value);
  }
}

// Slices that are walked side by side, for as many chains of additions.
template <int kR, int kC, int kRows, int kSide>
struct Slices {
  Slices<kR, kC, kRows, kSide - 1> before;
  Slice<Out16, kRows> sums;
  const uint16_t* first_k;
  const float* value;
  int64_t steps;
};
template <int kR, int kC, int kRows>
struct Slices<kR, kC, kRows, 0> {};

// Returns the steps that all of them have.
template <int kR, int kC, int kRows>
inline int64_t begin_slices(Slices<kR, kC, kRows, 0>&, const Pack& p, int64_t) {
  return p.total;
}
template <int kR, int kC, int kRows, int kSide>
inline int64_t begin_slices(Slices<kR, kC, kRows, kSide>& s, const Pack& p, int64_t slice) {
  const int64_t common = begin_slices(s.before, p, slice);
  slice += kSide - 1;
  const int64_t first = at_most(p.offset[slice], p.total);
  s.steps = at_most(p.offset[slice + 1], p.total) - first;
  s.first_k = p.first_k + first * (kSlice / kR);
  s.value = p.value + first * (kC * kSlice);
  clear(s.sums);
  return s.steps < common ? s.steps : common;
}

constexpr int64_t kBlocksAhead = 1024;  // floats

template <int kR, int kC, int kRows>
BLOCKS_INLINE void add_steps(Slices<kR, kC, kRows, 0>&, int64_t, const FewArgs&) {}
template <int kR, int kC, int kRows, int kSide>
BLOCKS_INLINE void add_steps(Slices<kR, kC, kRows, kSide>& s, int64_t step, const FewArgs& a) {
  add_steps(s.before, step, a);
  const float* const value = s.value + step * (kC * kSlice);
  for (int c = 0; c < kC; ++c) __builtin_prefetch(value + kBlocksAhead + c * kSlice);
  add_step<kR, kC>(s.sums, s.first_k + step * (kSlice / kR), value, a.x, a.x_stride);
}

template <int kR>
inline void write_rows(const Slice<Out16, 0>&, const FewArgs&, const uint8_t*, int64_t) {}
template <int kR, int kRows>
inline void write_rows(const Slice<Out16, kRows>& s, const FewArgs& a, const uint8_t* order, int64_t chunk) {
  write_rows<kR>(s.above, a, order, chunk);
  float lanes[kSlice];
  s.sum.store(lanes);
  for (int64_t g = 0; g < kSlice / kR; ++g) {
    const int64_t output = chunk + order[g] * kR, left = a.pack.n - output;
    float* const y = a.y + (kRows - 1) * a.y_stride + output;
    for (int64_t r = 0; r < (left < kR ? left : kR); ++r) y[r] = lanes[g * kR + r];
  }
}

template <int kR, int kC, int kRows>
inline void end_slices(Slices<kR, kC, kRows, 0>&, int64_t, const FewArgs&, int64_t) {}
template <int kR, int kC, int kRows, int kSide>
inline void end_slices(Slices<kR, kC, kRows, kSide>& s, int64_t done, const FewArgs& a, int64_t slice) {
  end_slices(s.before, done, a, slice);
  for (; done < s.steps; ++done)
    add_step<kR, kC>(s.sums, s.first_k + done * (kSlice / kR), s.value + done * (kC * kSlice), a.x, a.x_stride);
  slice += kSide - 1;
  const int64_t chunk = tile_width(a.pack.n);
  write_rows<kR>(s.sums, a, a.pack.order + slice * (kSlice / kR), slice / (chunk / kSlice) * chunk);
}

template <int kR, int kC, int kRows, int kSide>
inline void block_side(const FewArgs& a, int64_t slice) {
  Slices<kR, kC, kRows, kSide> s;
  const int64_t common = begin_slices(s, a.pack, slice);
  for (int64_t step = 0; step < common; ++step) add_steps(s, step, a);
  end_slices(s, common < 0 ? 0 : common, a, slice);
}

template <int kR, int kC, int kRows, int kSide>
void block_rows(const FewArgs& a) {
  int64_t slice = a.begin;
  for (; slice + kSide <= a.end; slice += kSide) block_side<kR, kC, kRows, kSide>(a, slice);
  for (; slice < a.end; ++slice) block_side<kR, kC, kRows, 1>(a, slice);
}

template <int kR, int kC>
void block_slices_of(const FewArgs& a) {
  switch (a.rows) {
    case 1: return block_rows<kR, kC, 1, kBlockSide>(a);
    case 2: return block_rows<kR, kC, 2, kBlockSide / 2>(a);
    case 3: return block_rows<kR, kC, 3, 1>(a);
    default: return block_rows<kR, kC, 4, 1>(a);
  }
}

void block_slices(const FewArgs& a) {
  switch (a.pack.block) {
    case 0x0104: return block_slices_of<1, 4>(a);
    case 0x0404: return block_slices_of<4, 4>(a);
    case 0x0808: return block_slices_of<8, 8>(a);
    case 0x1010: return block_slices_of<16, 16>(a);
    default: return block_slices_of<16, 1>(a);
  }
}

// --- Many rows -------------------------------------------------------------------------------------------------------

// kVecs vectors of sums of each of kOut outputs.
template <int kVecs, int kOut>
struct Tile {
  Tile<kVecs, kOut - 1> above;
  Vecs<kVecs> v;
};
template <int kVecs>
struct Tile<kVecs, 0> {};

inline void multiply_add(Vecs<0>&, Simd::F, const Vecs<0>&) {}
template <int kVecs>
inline void multiply_add(Vecs<kVecs>& s, Simd::F w, const Vecs<kVecs>& x) {
  multiply_add(s.rest, w, x.rest);
  s.v = Simd::fma(w, x.v, s.v);
}
template <int kVecs>
inline void multiply_add(Tile<kVecs, 0>&, const float*, const Vecs<kVecs>&) {}
template <int kVecs, int kOut>
inline void multiply_add(Tile<kVecs, kOut>& t, const float* value, const Vecs<kVecs>& x) {
  multiply_add(t.above, value, x);
  multiply_add(t.v, Simd::set1(value[kOut - 1]), x);
}
template <int kVecs>
inline void load(Tile<kVecs, 0>&, const float*, int64_t) {}
template <int kVecs, int kOut>
inline void load(Tile<kVecs, kOut>& t, const float* p, int64_t stride) {
  load(t.above, p, stride);
  load(t.v, p + (kOut - 1) * stride);
}
template <int kVecs>
inline void store(const Tile<kVecs, 0>&, float*, int64_t) {}
template <int kVecs, int kOut>
inline void store(const Tile<kVecs, kOut>& t, float* p, int64_t stride) {
  store(t.above, p, stride);
  store(t.v, p + (kOut - 1) * stride);
}

// Tiles of kSide places of a slice that are walked side by side.
template <int kR, int kC, int kLanes, int kVecs, int kOut, int kSide>
struct Tiles {
  Tiles<kR, kC, kLanes, kVecs, kOut, kSide - 1> before;
  Tile<kVecs, kOut> sums;
  const uint16_t* first_k;
  const float* value;
  float* home;
  int64_t count;
};
template <int kR, int kC, int kLanes, int kVecs, int kOut>
struct Tiles<kR, kC, kLanes, kVecs, kOut, 0> {};

constexpr int64_t kTilesAhead = 2048;  // floats

// What the tiles of a slice share: outputs `first` to first + kOut of each place, vectors from `column` on.
struct TilesAt {
  const Pack& pack;
  float* sums;  // the chunk's, from `column` on
  int64_t slice_first, slice_steps;
  const uint8_t* order;
  const uint32_t* count;  // steps of each place in these k blocks
  const uint32_t* done;   // and before them
  int64_t first;
  const float* ahead;  // what is asked for, line by line, under this slice
};

// The panel's rows of the k blocks at hand, from `column` on.
struct PanelRows {
  const float* x;
  int64_t last;  // a power of two less one
};

template <int kR, int kC, int kLanes, int kVecs, int kOut>
inline int64_t begin_tiles(Tiles<kR, kC, kLanes, kVecs, kOut, 0>&, const TilesAt& at, int64_t) {
  return at.slice_steps;
}
template <int kR, int kC, int kLanes, int kVecs, int kOut, int kSide>
inline int64_t begin_tiles(Tiles<kR, kC, kLanes, kVecs, kOut, kSide>& t, const TilesAt& at, int64_t place) {
  const int64_t common = begin_tiles(t.before, at, place);
  place += kSide - 1;
  const int64_t done = at.done[place] < at.slice_steps ? at.done[place] : at.slice_steps;
  t.count = at.count[place] < at.slice_steps - done ? at.count[place] : at.slice_steps - done;
  t.first_k = at.pack.first_k + (at.slice_first + done) * (kSlice / kR) + place;
  t.value = at.pack.value + (at.slice_first + done) * (kC * kSlice) + place * kR + at.first;
  t.home = at.sums + ((at.order[place] & (kChunk / kR - 1)) * kR + at.first) * kLanes;
  load(t.sums, t.home, kLanes);
  return t.count < common ? t.count : common;
}

template <int kR, int kC, int kLanes, int kVecs, int kOut, int kSide>
BLOCKS_INLINE void add_block(Tiles<kR, kC, kLanes, kVecs, kOut, kSide>& t, int64_t step, const PanelRows& panel,
                             const float*& ahead) {
  // A step's lines, shared by the tiles that come by.
  constexpr int kLines = (kC * kOut * kVecs * Simd::kWidth + kSlice * kLanes - 1) / (kSlice * kLanes);
  for (int line = 0; line < kLines; ++line) __builtin_prefetch(ahead + line * kSlice);
  ahead += kLines * kSlice;
  // Whatever k it is, it lies in these blocks, behind which the panel goes on.
  const float* x = panel.x + (t.first_k[step * (kSlice / kR)] & panel.last) * kLanes;
  const float* value = t.value + step * (kC * kSlice);
#pragma GCC unroll 4
  for (int c = 0; c < kC; ++c) {
    Vecs<kVecs> vecs;
    load(vecs, x + c * kLanes);
    multiply_add(t.sums, value + c * kSlice, vecs);
  }
}
template <int kR, int kC, int kLanes, int kVecs, int kOut>
BLOCKS_INLINE void add_blocks(Tiles<kR, kC, kLanes, kVecs, kOut, 0>&, int64_t, const PanelRows&, const float*&) {}
template <int kR, int kC, int kLanes, int kVecs, int kOut, int kSide>
BLOCKS_INLINE void add_blocks(Tiles<kR, kC, kLanes, kVecs, kOut, kSide>& t, int64_t step, const PanelRows& panel,
                              const float*& ahead) {
  add_blocks(t.before, step, panel, ahead);
  add_block(t, step, panel, ahead);
}
template <int kR, int kC, int kLanes, int kVecs, int kOut>
inline void end_tiles(Tiles<kR, kC, kLanes, kVecs, kOut, 0>&, int64_t, const PanelRows&, const float*&) {}
template <int kR, int kC, int kLanes, int kVecs, int kOut, int kSide>
inline void end_tiles(Tiles<kR, kC, kLanes, kVecs, kOut, kSide>& t, int64_t step, const PanelRows& panel,
                      const float*& ahead) {
  end_tiles(t.before, step, panel, ahead);
  for (; step < t.count; ++step) add_block(t, step, panel, ahead);
  store(t.sums, t.home, kLanes);
}

// A panel of kLanes rows in parts of kVecs vectors: tiles of kOut outputs, kSide of them side by side. Where these
// cover a slice and the panel, the values are read once, in order, and x may lie in L2: no sums go to memory before
// kTileSpan. Else a slice's values come again for every tile and have to stay in L1 with the panel: few k at a time,
// but more in narrow panels, so that the next slice's lines have time to arrive.
template <int kR, int kC, int kLanes, int kVecs, int kOut, int kSide>
void block_panel_lanes(const TileArgs& a) {
  constexpr int64_t kGroups = kSlice / kR;
  static_assert(kR % kOut == 0 && kGroups % kSide == 0 && kLanes % (kVecs * Simd::kWidth) == 0, "whole tiles");
  const Pack& p = a.pack;
  constexpr bool kOnce = kSide * kR == kSlice && kOut == kR && kLanes == kVecs * Simd::kWidth;
  constexpr int64_t kSpan = (kOnce ? kTileSpan : kLanes < 32 ? 32 * kTileK : kLanes * kTileK) / kLanes;  // k
  static_assert((kSpan & (kSpan - 1)) == 0 && kSpan % kTileK == 0 && kSpan * kLanes <= kTileSpan, "whole blocks");
  const int64_t blocks = (p.k + kTileK - 1) / kTileK, all = (p.n + kSlice - 1) / kSlice;
  const int64_t width = tile_width(p.n), slices = width / kSlice;
  const int64_t begin = a.chunk * slices, end = begin + slices < all ? begin + slices : all;
  uint32_t done[kChunk / kR] = {};
  memset(a.sums, 0, static_cast<size_t>(width * kLanes) * sizeof(float));
  for (int64_t b = 0; b < blocks; b += kSpan / kTileK)
    for (int64_t slice = begin; slice < end; ++slice) {
      uint32_t count[kGroups] = {};
      for (int64_t i = b; i < b + kSpan / kTileK && i < blocks; ++i)
        for (int64_t g = 0; g < kGroups; ++g) count[g] += p.count[(slice * blocks + i) * kGroups + g];
      const int64_t first = at_most(p.offset[slice], p.total), last = at_most(p.offset[slice + 1], p.total);
      TilesAt at{p,
                 nullptr,
                 first,
                 last < first ? 0 : last - first,
                 p.order + slice * kGroups,
                 count,
                 done + (slice - begin) * kGroups,
                 0,
                 nullptr};
      const int64_t next = kOnce ? slice : slice + 1 < end ? slice + 1 : begin;
      const int64_t next_step = at_most(p.offset[next], p.total) + done[(next - begin) * kGroups];
      at.ahead = p.value + next_step * (kC * kSlice) + (kOnce ? kTilesAhead : 0);
      __builtin_prefetch(p.first_k + next_step * kGroups);
      __builtin_prefetch(p.first_k + next_step * kGroups + 32);
      for (int64_t place = 0; place < kGroups; place += kSide)
        for (int64_t column = 0; column < kLanes; column += kVecs * Simd::kWidth)
          for (at.first = 0; at.first < kR; at.first += kOut) {
            const PanelRows panel{a.panel + b * kTileK * kLanes + column, kSpan - 1};
            at.sums = a.sums + column;
            Tiles<kR, kC, kLanes, kVecs, kOut, kSide> t;
            const int64_t common = begin_tiles(t, at, place);
            for (int64_t step = 0; step < common; ++step) add_blocks(t, step, panel, at.ahead);
            end_tiles(t, common, panel, at.ahead);
          }
      for (int64_t g = 0; g < kGroups; ++g) done[(slice - begin) * kGroups + g] += count[g];
    }
}

template <int kLanes>
void block_panel_of(const TileArgs& a) {
  using P = BlockPanel<kLanes>;
  switch (a.pack.block) {
    case 0x0104: return block_panel_lanes<1, 4, kLanes, P::kVecs1, 1, P::kSide1>(a);
    case 0x0404: return block_panel_lanes<4, 4, kLanes, P::kVecs, 4, P::kSide4>(a);
    case 0x0808: return block_panel_lanes<8, 8, kLanes, P::kVecs, P::kOut, 1>(a);
    case 0x1010: return block_panel_lanes<16, 16, kLanes, P::kVecs, P::kOut, 1>(a);
    default: return block_panel_lanes<16, 1, kLanes, P::kVecs, P::kOut, 1>(a);
  }
}

#undef BLOCKS_INLINE

}  // namespace
