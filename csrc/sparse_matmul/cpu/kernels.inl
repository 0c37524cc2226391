// The kernels of sparse_matmul, one body for every level. Before this the level brings simd/<level>.h and two types of
// 16 lanes (one type may serve as both), Narrow for one row of x and Wide for more:
//   zero()                       all lanes 0
//   expand(value, mask)          value[i-th set bit] in the lanes of set bits, 0 elsewhere; may read 16 floats
//   load(p), store(p)            16 floats
//   gather(x, index, last)       x[min(index[lane], last)]
//   broadcast(p), fma(w, x, s)   s += w * x
// and  void transpose8x8(const float* in, int64_t in_stride, float* out, int64_t out_stride).
#include <string.h>

#include "../../runtime/simd/activate.inl"
#include "../sparse_matmul.h"

namespace {

using namespace fs::sparse_matmul;

inline int64_t at_most(uint64_t value, int64_t limit) {
  return value < static_cast<uint64_t>(limit) ? static_cast<int64_t>(value) : limit;
}

// Registers are named through nested structs, one level a row: gcc 12 spills an array of them.
template <class V, int kRows>
struct Sums {
  Sums<V, kRows - 1> above;
  V low, high;
};
template <class V>
struct Sums<V, 0> {};

template <class V>
inline void clear(Sums<V, 0>&) {}
template <class V, int kRows>
inline void clear(Sums<V, kRows>& s) {
  clear(s.above);
  s.low = V::zero();
  s.high = V::zero();
}

template <class V>
inline void multiply_add(Sums<V, 0>&, const V&, const V&, const float*, int64_t) {}
template <class V, int kRows>
inline void multiply_add(Sums<V, kRows>& s, const V& low, const V& high, const float* x, int64_t stride) {
  multiply_add(s.above, low, high, x, stride);
  const auto broadcast = V::broadcast(x + (kRows - 1) * stride);
  s.low = V::fma(low, broadcast, s.low);
  s.high = V::fma(high, broadcast, s.high);
}

template <class V>
inline void write(const Sums<V, 0>&, float*, int64_t, int64_t) {}
template <class V, int kRows>
inline void write(const Sums<V, kRows>& s, float* y, int64_t stride, int64_t columns) {
  write(s.above, y, stride, columns);
  y += (kRows - 1) * stride;
  if (columns == kBitmapColumns) {
    s.low.store(y);
    s.high.store(y + 16);
  } else {
    float lanes[kBitmapColumns];
    s.low.store(lanes);
    s.high.store(lanes + 16);
    memcpy(y, lanes, static_cast<size_t>(columns) * sizeof(float));
  }
}

// How far ahead of their use values are asked for: docs/kernels/sparse_matmul.md.
constexpr int64_t kBitmapAhead = 1024;  // floats
constexpr int64_t kSellAhead = 4096;    // bytes

template <class V, int kRows>
void bitmap_rows(const FewArgs& a) {
  const Pack& p = a.pack;
  const float* const limit = p.value + p.total;
  for (int64_t b = a.begin; b < a.end; ++b) {
    const uint32_t* mask = p.mask + b * p.k;
    const float* value = p.value + at_most(p.offset[b], p.total);
    Sums<V, kRows> sums;
    clear(sums);
    for (int64_t begin = 0; begin < p.k; begin += 8) {
      const int64_t end = begin + 8 < p.k ? begin + 8 : p.k;
      for (int64_t k = begin; k < end; ++k) {
        const uint32_t m = mask[k];
        __builtin_prefetch(value + kBitmapAhead);  // a prefetch cannot fault: it may go beyond the pack
        const float* const middle = value + __builtin_popcount(m & 0xffff);
        const V low = V::expand(value, m & 0xffff), high = V::expand(middle, m >> 16);
        value += __builtin_popcount(m);
        multiply_add(sums, low, high, a.x + k, a.x_stride);
      }
      // 8 steps go at most 256 on, and kSlack holds that and one read more.
      value = value < limit ? value : limit;
    }
    const int64_t left = p.n - b * kBitmapColumns;
    write(sums, a.y + b * kBitmapColumns, a.y_stride, left < kBitmapColumns ? left : kBitmapColumns);
  }
}

void bitmap(const FewArgs& a) {
  switch (a.rows) {
    case 1: return bitmap_rows<Narrow, 1>(a);
    case 2: return bitmap_rows<Wide, 2>(a);
    default: return bitmap_rows<Wide, 3>(a);
  }
}

// One row of sums a level.
template <class V, int kRows>
struct Slice {
  Slice<V, kRows - 1> above;
  V sum;
};
template <class V>
struct Slice<V, 0> {};

template <class V>
inline void clear(Slice<V, 0>&) {}
template <class V, int kRows>
inline void clear(Slice<V, kRows>& s) {
  clear(s.above);
  s.sum = V::zero();
}

template <class V, class Index>
inline void gather_add(Slice<V, 0>&, const V&, const Index&, const float*, int64_t) {}
template <class V, class Index, int kRows>
inline void gather_add(Slice<V, kRows>& s, const V& w, const Index& index, const float* x, int64_t stride) {
  gather_add(s.above, w, index, x, stride);
  s.sum = V::multiply_add(w, index.of(x + (kRows - 1) * stride), s.sum);
}

template <class V>
inline void scatter(const Slice<V, 0>&, const uint32_t*, int64_t, float*, int64_t) {}
template <class V, int kRows>
inline void scatter(const Slice<V, kRows>& s, const uint32_t* row, int64_t n, float* y, int64_t stride) {
  scatter(s.above, row, n, y, stride);
  float lanes[kSellRows];
  s.sum.store(lanes);
  for (int64_t lane = 0; lane < kSellRows; ++lane)
    if (row[lane] < n) y[(kRows - 1) * stride + row[lane]] = lanes[lane];
}

template <int kRows>
void sell_rows(const FewArgs& a) {
  const Pack& p = a.pack;
  for (int64_t slice = a.begin; slice < a.end; ++slice) {
    const uint8_t* step = p.step + at_most(p.offset[slice], p.total) * kSellStepBytes;
    const uint8_t* const end = p.step + at_most(p.offset[slice + 1], p.total) * kSellStepBytes;
    Slice<Narrow, kRows> sums;
    clear(sums);
    for (; step < end; step += kSellStepBytes) {
      __builtin_prefetch(step + kSellAhead);
      __builtin_prefetch(step + kSellAhead + 64);
      const Narrow w = Narrow::load(reinterpret_cast<const float*>(step));
      gather_add(sums, w, Narrow::Index(step + 64, static_cast<uint16_t>(p.k - 1)), a.x, a.x_stride);
    }
    scatter(sums, p.row + slice * kSellRows, p.n, a.y, a.y_stride);
  }
}

void sell(const FewArgs& a) {
  switch (a.rows) {
    case 1: return sell_rows<1>(a);
    case 2: return sell_rows<2>(a);
    default: return sell_rows<3>(a);
  }
}

// kVecs vectors of sums of one output.
template <int kVecs>
struct Vecs {
  Vecs<kVecs - 1> rest;
  Simd::F v;
};
template <>
struct Vecs<0> {};

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

template <int kVecs>
void panel_lanes(const PanelArgs& a) {
  constexpr int64_t kLanes = kVecs * Simd::kWidth;
  const Pack& p = a.pack;
  const int64_t blocks = (p.k + kBlockK - 1) / kBlockK;
  const uint8_t* order = p.order + a.chunk * blocks * 2 * kChunk;
  int64_t at = at_most(p.offset[a.chunk], p.total);
  memset(a.sums, 0, static_cast<size_t>(kChunk * a.lanes) * sizeof(float));
  for (int64_t b = 0; b < blocks; ++b, order += 2 * kChunk) {
    const float* panel = a.panel + b * kBlockK * a.lanes;
    for (int64_t place = 0; place < kChunk; ++place) {
      const int64_t count = order[kChunk + place];
      if (count == 0) break;  // descending: only zeros follow
      float* sums = a.sums + order[place] * a.lanes;
      const float* value = p.value + at;
      const uint8_t* index = p.index + at;
      // One pass for the levels whose registers hold all lanes, several for the scalar one.
      for (int64_t lane = 0; lane < a.lanes; lane += kLanes) {
        Vecs<kVecs> s;
        load(s, sums + lane);
        for (int64_t i = 0; i < count; ++i)
          multiply_add(s, Simd::set1(value[i]), panel + lane + (index[i] & (kBlockK - 1)) * a.lanes);
        store(s, sums + lane);
      }
      at = at_most(static_cast<uint64_t>(at + count), p.total);
    }
  }
}

void transpose(const TransposeArgs& t) {
  for (int64_t r = 0; r < t.rows; r += 8)
    for (int64_t c = 0; c < t.columns; c += 8) {
      const float* in = t.in + r * t.in_stride + c;
      float* out = t.out + c * t.out_stride + r;
      if (r + 8 <= t.rows && c + 8 <= t.columns) {
        transpose8x8(in, t.in_stride, out, t.out_stride);
        continue;
      }
      const int64_t rows = t.rows - r < 8 ? t.rows - r : 8, columns = t.columns - c < 8 ? t.columns - c : 8;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) out[j * t.out_stride + i] = in[i * t.in_stride + j];
    }
}

template <fs::Activation kActivation>
void finish_with(const FinishArgs& f) {
  using S = Simd;
  // Without a bias -0.0 is added, which changes nothing, not even the sign of a zero.
  const S::F no_bias = S::set1(-0.0f);
  int64_t i = 0;
  for (; i + S::kWidth <= f.count; i += S::kWidth)
    S::store(f.y + i, activate<kActivation>(S::add(S::load(f.sum + i), f.bias ? S::load(f.bias + i) : no_bias)));
  if (i < f.count) {
    const int n = static_cast<int>(f.count - i);
    const S::F bias = f.bias ? S::load_n(f.bias + i, n) : no_bias;
    S::store_n(f.y + i, activate<kActivation>(S::add(S::load_n(f.sum + i, n), bias)), n);
  }
}

void finish(const FinishArgs& f) {
  switch (f.activation) {
    case fs::Activation::none: return finish_with<fs::Activation::none>(f);
    case fs::Activation::relu: return finish_with<fs::Activation::relu>(f);
    case fs::Activation::gelu: return finish_with<fs::Activation::gelu>(f);
    case fs::Activation::silu: return finish_with<fs::Activation::silu>(f);
  }
}

}  // namespace
