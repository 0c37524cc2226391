// The kernels of sparse_matmul, one body for every level. Before this the level brings simd/<level>.h and two types of
// 16 lanes (one type may serve as both), Narrow for one row of x and Wide for more:
//   zero()                       all lanes 0
//   expand(value, end, mask)     value[i-th set bit] in the lanes of set bits, 0 elsewhere; value + set bits = end; may
//                                read 4 floats before value and 16 behind it
//   load(p), store(p)            16 floats
//   Index(p).of(x)               x[p[lane]], p sixteen u16
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

// The sums of 16 outputs for kRows rows of x, one row a level: gcc 12 spills an array of registers.
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

template <class V>
inline void multiply_add(Slice<V, 0>&, const V&, const float*, int64_t) {}
template <class V, int kRows>
inline void multiply_add(Slice<V, kRows>& s, const V& w, const float* x, int64_t stride) {
  multiply_add(s.above, w, x, stride);
  s.sum = V::fma(w, V::broadcast(x + (kRows - 1) * stride), s.sum);
}

// The first `columns` of 16 outputs; nothing if there are none.
template <class V>
inline void write(const Slice<V, 0>&, float*, int64_t, int64_t) {}
template <class V, int kRows>
inline void write(const Slice<V, kRows>& s, float* y, int64_t stride, int64_t columns) {
  if (columns <= 0) return;
  write(s.above, y, stride, columns);
  y += (kRows - 1) * stride;
  if (columns >= 16) return s.sum.store(y);
  float lanes[16];
  s.sum.store(lanes);
  memcpy(y, lanes, static_cast<size_t>(columns) * sizeof(float));
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
    Slice<V, kRows> low, high;
    clear(low);
    clear(high);
    uint32_t m = mask[0];  // loaded a step ahead: a position depends on all masks before it
    for (int64_t begin = 0; begin < p.k; begin += 8) {
      const int64_t end = begin + 8 < p.k ? begin + 8 : p.k;
      for (int64_t k = begin; k < end; ++k) {
        const uint32_t next_mask = mask[k + 1];  // the last one lies in the next section, and is not used
        const float* const middle = value + __builtin_popcount(m & 0xffff);
        const float* const next_value = value + __builtin_popcount(m);
        __builtin_prefetch(value + kBitmapAhead);  // a prefetch cannot fault: it may go beyond the pack
        multiply_add(low, V::expand(value, middle, m & 0xffff), a.x + k, a.x_stride);
        multiply_add(high, V::expand(middle, next_value, m >> 16), a.x + k, a.x_stride);
        value = next_value;
        m = next_mask;
      }
      // 8 steps go at most 256 on, and kSlack holds that and one read more.
      value = value < limit ? value : limit;
    }
    float* const y = a.y + b * kBitmapColumns;
    const int64_t left = p.n - b * kBitmapColumns;
    write(low, y, a.y_stride, left);
    write(high, y + 16, a.y_stride, left - 16);
  }
}

// Half a block (0: the low 16 outputs, 1: the high ones), for so many rows that the sums of a whole one do not fit the
// registers.
template <class V, int kRows, int kHalf>
void bitmap_half(const FewArgs& a, int64_t b) {
  const Pack& p = a.pack;
  const float* const limit = p.value + p.total;
  const uint32_t* mask = p.mask + b * p.k;
  const float* value = p.value + at_most(p.offset[b], p.total);
  Slice<V, kRows> sums;
  clear(sums);
  uint32_t m = mask[0];
  for (int64_t begin = 0; begin < p.k; begin += 8) {
    const int64_t end = begin + 8 < p.k ? begin + 8 : p.k;
    for (int64_t k = begin; k < end; ++k) {
      const uint32_t next_mask = mask[k + 1];
      const float* const middle = value + __builtin_popcount(m & 0xffff);
      const float* const next_value = value + __builtin_popcount(m);
      __builtin_prefetch(value + kBitmapAhead);
      const V w = kHalf == 0 ? V::expand(value, middle, m & 0xffff) : V::expand(middle, next_value, m >> 16);
      multiply_add(sums, w, a.x + k, a.x_stride);
      value = next_value;
      m = next_mask;
    }
    value = value < limit ? value : limit;
  }
  const int64_t column = b * kBitmapColumns + 16 * kHalf;
  write(sums, a.y + column, a.y_stride, p.n - column);
}

template <class V, int kRows>
void bitmap_halves(const FewArgs& a) {
  for (int64_t b = a.begin; b < a.end; ++b) {
    bitmap_half<V, kRows, 0>(a, b);
    bitmap_half<V, kRows, 1>(a, b);
  }
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
      gather_add(sums, w, Narrow::Index(step + 64), a.x, a.x_stride);
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
