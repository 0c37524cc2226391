// blocks_s8 against a panel of x, one body for every level. The level brings, before this, `struct Lanes`:
//   kWidth                     rows of x in a vector
//   kSteps                     dwords that hold 4 codes: 1 (u8, s8) or 2 (s16)
//   kXOuter                    4x4: an x vector is loaded once for four outputs; else memory operands, output by output
//   kQuadVecs                  4x4: vectors side by side, as many as the registers hold sums of
//   V, zero(), set1(s32), load(p), store(p, v), add(a, b)     of s32; additions wrap
//   Weight, weight(p)          4 s8 for all rows
//   X, x(p, stride)            4 codes of kWidth rows, their dwords `stride` bytes apart
//   dot(sum, x, w)             sum + the 4 products of each row
//   kFourWeights               1x4: four_weights(p) loads the weights of four blocks, weight<i>() is block i's of them
// Idea     all rows meet the same weights: a stored block costs one broadcast of 4 weights an output, whatever the
// pattern. Order    unit by unit in descending order of blocks, so that the trip count is the last one's or a little
// less and
//          is predicted; the x of a block of k (32 KB for 64 rows) stays in L1, the sums of a chunk in L2.
#include <string.h>

#include "../int8.h"

namespace {

using namespace fs::sparse_matmul::int8;

// Registers are named through nested structs: gcc 12 spills an array of them.
template <int kVecs>
struct Vecs {
  Vecs<kVecs - 1> rest;
  Lanes::V v;
};
template <>
struct Vecs<0> {};

inline void set(Vecs<0>&, Lanes::V) {}
template <int kVecs>
inline void set(Vecs<kVecs>& s, Lanes::V v) {
  set(s.rest, v);
  s.v = v;
}

inline void load(Vecs<0>&, const int32_t*) {}
template <int kVecs>
inline void load(Vecs<kVecs>& s, const int32_t* p) {
  load(s.rest, p);
  s.v = Lanes::load(p + Lanes::kWidth * (kVecs - 1));
}

inline void store(const Vecs<0>&, int32_t*) {}
template <int kVecs>
inline void store(const Vecs<kVecs>& s, int32_t* p) {
  store(s.rest, p);
  Lanes::store(p + Lanes::kWidth * (kVecs - 1), s.v);
}

inline void add(Vecs<0>&, const Vecs<0>&) {}
template <int kVecs>
inline void add(Vecs<kVecs>& s, const Vecs<kVecs>& other) {
  add(s.rest, other.rest);
  s.v = Lanes::add(s.v, other.v);
}

inline void dot(Vecs<0>&, const uint8_t*, int64_t, Lanes::Weight) {}
template <int kVecs>
inline void dot(Vecs<kVecs>& s, const uint8_t* x, int64_t stride, Lanes::Weight w) {
  dot(s.rest, x, stride, w);
  s.v = Lanes::dot(s.v, Lanes::x(x + 4 * Lanes::kWidth * (kVecs - 1), stride), w);
}

// The sums of four outputs.
template <int kVecs>
struct Quad {
  Vecs<kVecs> a, b, c, d;
};

inline void dot(Vecs<0>&, Vecs<0>&, Vecs<0>&, Vecs<0>&, const uint8_t*, int64_t, Lanes::Weight, Lanes::Weight,
                Lanes::Weight, Lanes::Weight) {}
template <int kVecs>
inline void dot(Vecs<kVecs>& a, Vecs<kVecs>& b, Vecs<kVecs>& c, Vecs<kVecs>& d, const uint8_t* x, int64_t stride,
                Lanes::Weight wa, Lanes::Weight wb, Lanes::Weight wc, Lanes::Weight wd) {
  dot(a.rest, b.rest, c.rest, d.rest, x, stride, wa, wb, wc, wd);
  const Lanes::X four = Lanes::x(x + 4 * Lanes::kWidth * (kVecs - 1), stride);
  a.v = Lanes::dot(a.v, four, wa);
  b.v = Lanes::dot(b.v, four, wb);
  c.v = Lanes::dot(c.v, four, wc);
  d.v = Lanes::dot(d.v, four, wd);
}

// One unit's stored blocks: [count] indices and values, x of this block of k.
struct Unit {
  const uint8_t* index;
  const int8_t* value;
  int64_t count;
};

// Index `kByte` of eight, times kGroupBytes, a power of two.
template <int64_t kGroupBytes, int kByte>
inline uint64_t group_at(uint64_t eight) {
  constexpr int kShift = __builtin_ctzll(kGroupBytes), kDown = 8 * kByte - kShift;
  if constexpr (kDown >= 0)
    return eight >> kDown & uint64_t{255} << kShift;
  else
    return eight << -kDown & uint64_t{255} << kShift;
}

// Blocks kFirst .. kFirst + 3 of the eight whose indices are given. L: Lanes, as a parameter for levels without them.
template <class L, int64_t kGroupBytes, int kFirst, int kVecs>
[[gnu::always_inline]] inline void four_blocks(Vecs<kVecs>& even, Vecs<kVecs>& odd, const uint8_t* x, uint64_t eight,
                                               const int8_t* value) {
  constexpr int64_t kStride = kGroupBytes / L::kSteps;
  const typename L::FourWeights w = L::four_weights(value);
  dot(even, x + group_at<kGroupBytes, kFirst>(eight), kStride, L::template weight<0>(w));
  dot(odd, x + group_at<kGroupBytes, kFirst + 1>(eight), kStride, L::template weight<1>(w));
  dot(even, x + group_at<kGroupBytes, kFirst + 2>(eight), kStride, L::template weight<2>(w));
  dot(odd, x + group_at<kGroupBytes, kFirst + 3>(eight), kStride, L::template weight<3>(w));
}

// A row of sums: two sets, as one chain for each vector of x would wait for itself.
template <int kVecs, int kLanes>
inline void row_of_blocks(const Unit& u, const uint8_t* x, int32_t* sums, bool first, int32_t start) {
  constexpr int64_t kStride = 4 * kLanes, kGroupBytes = kStride * Lanes::kSteps;
  Vecs<kVecs> even, odd;
  if (first)
    set(even, Lanes::set1(start));
  else
    load(even, sums);
  set(odd, Lanes::zero());
  const uint8_t* index = u.index;
  const int8_t* value = u.value;
  int64_t left = u.count;
  if constexpr (Lanes::kFourWeights) {
    for (; left >= 8; left -= 8, index += 8, value += 32) {
      uint64_t eight;
      memcpy(&eight, index, 8);
      four_blocks<Lanes, kGroupBytes, 0>(even, odd, x, eight, value);
      four_blocks<Lanes, kGroupBytes, 4>(even, odd, x, eight, value + 16);
    }
    if (left >= 4) {
      uint32_t four;
      memcpy(&four, index, 4);
      four_blocks<Lanes, kGroupBytes, 0>(even, odd, x, four, value);
      left -= 4;
      index += 4;
      value += 16;
    }
  }
  for (; left >= 2; left -= 2, index += 2, value += 8) {
    dot(even, x + index[0] * kGroupBytes, kStride, Lanes::weight(value));
    dot(odd, x + index[1] * kGroupBytes, kStride, Lanes::weight(value + 4));
  }
  if (left > 0) dot(even, x + index[0] * kGroupBytes, kStride, Lanes::weight(value));
  add(even, odd);
  store(even, sums);
}

template <int kVecs, int kLanes>
inline void quad_of_blocks(const Unit& u, const uint8_t* x, int32_t* sums, bool first, const uint32_t* start) {
  constexpr int64_t kStride = 4 * kLanes, kGroupBytes = kStride * Lanes::kSteps;
  Quad<kVecs> s;
  if (first) {
    set(s.a, Lanes::set1(static_cast<int32_t>(start[0])));
    set(s.b, Lanes::set1(static_cast<int32_t>(start[1])));
    set(s.c, Lanes::set1(static_cast<int32_t>(start[2])));
    set(s.d, Lanes::set1(static_cast<int32_t>(start[3])));
  } else {
    load(s.a, sums);
    load(s.b, sums + kLanes);
    load(s.c, sums + 2 * kLanes);
    load(s.d, sums + 3 * kLanes);
  }
  const uint8_t* index = u.index;
  const int8_t* w = u.value;
  for (const uint8_t* end = index + u.count; index != end; ++index, w += 16) {
    const uint8_t* at = x + *index * kGroupBytes;
    if constexpr (Lanes::kXOuter) {
      dot(s.a, s.b, s.c, s.d, at, kStride, Lanes::weight(w), Lanes::weight(w + 4), Lanes::weight(w + 8),
          Lanes::weight(w + 12));
    } else {
      dot(s.a, at, kStride, Lanes::weight(w));
      dot(s.b, at, kStride, Lanes::weight(w + 4));
      dot(s.c, at, kStride, Lanes::weight(w + 8));
      dot(s.d, at, kStride, Lanes::weight(w + 12));
    }
  }
  store(s.a, sums);
  store(s.b, sums + kLanes);
  store(s.c, sums + 2 * kLanes);
  store(s.d, sums + 3 * kLanes);
}

// A chunk for kVecs vectors of a panel. kRows: outputs of a block.
template <int kRows, int kVecs>
void chunk_of(const PanelArgs& a) {
  constexpr int kLanes = kVecs * Lanes::kWidth;
  constexpr int64_t kUnits = kOutputs / kRows;
  const Blocks& w = a.weight;
  const int64_t k_blocks = w.k_blocks();
  const uint8_t* order = w.order + a.chunk * k_blocks * 2 * kUnits;
  const int32_t* column_sum = w.sum + a.chunk * kOutputs;
  int64_t position =
      w.offset[a.chunk] < static_cast<uint64_t>(w.total) ? static_cast<int64_t>(w.offset[a.chunk]) : w.total;
  for (int64_t block = 0; block < k_blocks; ++block, order += 2 * kUnits) {
    const uint8_t* x = a.panel + block * kGroups * Lanes::kSteps * 4 * kLanes;
    for (int64_t i = 0; i < kUnits; ++i) {
      Unit u{w.index + position, w.value + position * kRows * kTileK, order[kUnits + i]};
      if (u.count > w.total - position) u.count = w.total - position;
      if (u.count == 0 && block > 0) continue;
      const int64_t row = (order[i] & (kUnits - 1)) * kRows;
      int32_t* sums = a.sums + row * kLanes;
      uint32_t start[kRows];  // unsigned: sums of a damaged pack may wrap
      for (int r = 0; r < kRows; ++r)
        start[r] = 0u - static_cast<uint32_t>(a.offset) * static_cast<uint32_t>(column_sum[row + r]);
      if constexpr (kRows == 1) {
        row_of_blocks<kVecs, kLanes>(u, x, sums, block == 0, static_cast<int32_t>(start[0]));
      } else {
        constexpr int kPart = kVecs < Lanes::kQuadVecs ? kVecs : Lanes::kQuadVecs;
        for (int v = 0; v < kVecs; v += kPart)
          quad_of_blocks<kPart, kLanes>(u, x + 4 * Lanes::kWidth * v, sums + Lanes::kWidth * v, block == 0, start);
      }
      position += u.count;
    }
  }
}

template <int kRows>
void blocks_of(const PanelArgs& a) {
  switch (a.lanes / Lanes::kWidth) {
    case 1: return chunk_of<kRows, 1>(a);
    case 2: return chunk_of<kRows, 2>(a);
    default: return chunk_of<kRows, 4>(a);
  }
}

void blocks(const PanelArgs& a) { return a.weight.rows == 1 ? blocks_of<1>(a) : blocks_of<4>(a); }

}  // namespace
