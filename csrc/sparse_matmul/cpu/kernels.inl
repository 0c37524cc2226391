// The kernels of sparse_matmul, one body for every level but where AVX-512 has its own (*_avx512.inl). Before this the
// level brings simd/<level>.h and, for the bitmap, Lanes, 16 lanes:
//   zero()                       all lanes 0
//   expand(value, mask)          value[i-th set bit] in the lanes of set bits, 0 elsewhere; value float or (widened)
//                                bfloat16; may read 16 values
//   store(p)                     16 floats
//   broadcast(p), fma(w, x, s)   s += w * x
// and  void transpose8x8(const float* in, int64_t in_stride, float* out, int64_t out_stride),
//      transpose_tile(in, in_stride, store): store(j, v) with v[i] = in[i * in_stride + j], for Simd::kWidth i and j.
#include <string.h>

#include "../../runtime/simd/activate.inl"
#include "../sparse_matmul.h"
#include "../training.h"

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
// The set bits of the low half of a mask. Not of `mask & 0xffff`: of that gcc 12 makes a popcnt into 16 bits of a
// register, which waits for the rest of it, and so for the popcnt before.
inline int low_bits(uint32_t mask) { return __builtin_popcount(mask << 16); }

constexpr int64_t kBitmapAhead = 1024;  // values

// The values of a bitmap32 or panels128 pack.
template <class T>
inline const T* values(const Pack& p);
template <>
inline const float* values(const Pack& p) {
  return p.value;
}
template <>
inline const uint16_t* values(const Pack& p) {
  return p.value16;
}

template <class V, int kRows, class T>
void bitmap_rows(const FewArgs& a) {
  const Pack& p = a.pack;
  const T* const limit = values<T>(p) + p.total;
  for (int64_t b = a.begin; b < a.end; ++b) {
    const uint32_t* mask = p.mask + b * p.k;
    const T* value = values<T>(p) + at_most(p.offset[b], p.total);
    Slice<V, kRows> low, high;
    clear(low);
    clear(high);
    uint32_t m = mask[0];  // loaded a step ahead: a position depends on all masks before it
    for (int64_t k = 0; k < p.k; ++k) {
      const uint32_t next_mask = mask[k + 1];  // the last one lies in the next section, and is not used
      const T* const middle = value + low_bits(m);
      const T* const next_value = value + __builtin_popcount(m);
      __builtin_prefetch(value + kBitmapAhead);  // a prefetch cannot fault: it may go beyond the pack
      multiply_add(low, V::expand(value, m & 0xffff), a.x + k, a.x_stride);
      multiply_add(high, V::expand(middle, m >> 16), a.x + k, a.x_stride);
      value = next_value < limit ? next_value : limit;  // kSlack has room for one step from there on
      m = next_mask;
    }
    float* const y = a.y + b * kBitmapColumns;
    const int64_t left = p.n - b * kBitmapColumns;
    write(low, y, a.y_stride, left);
    write(high, y + 16, a.y_stride, left - 16);
  }
}

// Half a block (0: the low 16 outputs, 1: the high ones), for so many rows that the sums of a whole one do not fit the
// registers.
template <class V, int kRows, class T, int kHalf>
void bitmap_half(const FewArgs& a, int64_t b) {
  const Pack& p = a.pack;
  const T* const limit = values<T>(p) + p.total;
  const uint32_t* mask = p.mask + b * p.k;
  const T* value = values<T>(p) + at_most(p.offset[b], p.total);
  Slice<V, kRows> sums;
  clear(sums);
  uint32_t m = mask[0];
  for (int64_t k = 0; k < p.k; ++k) {
    const uint32_t next_mask = mask[k + 1];
    const T* const middle = value + low_bits(m);
    const T* const next_value = value + __builtin_popcount(m);
    __builtin_prefetch(value + kBitmapAhead);
    const V w = kHalf == 0 ? V::expand(value, m & 0xffff) : V::expand(middle, m >> 16);
    multiply_add(sums, w, a.x + k, a.x_stride);
    value = next_value < limit ? next_value : limit;
    m = next_mask;
  }
  const int64_t column = b * kBitmapColumns + 16 * kHalf;
  write(sums, a.y + column, a.y_stride, p.n - column);
}

template <class V, int kRows, class T>
void bitmap_halves(const FewArgs& a) {
  for (int64_t b = a.begin; b < a.end; ++b) {
    bitmap_half<V, kRows, T, 0>(a, b);
    bitmap_half<V, kRows, T, 1>(a, b);
  }
}

// Where the window of a step of sell8 begins in a row of x.
inline const float* sell_x(const float* x, uint16_t base) {
  return x + (base & (kMaxSellK / kSell8Base - 1)) * kSell8Base;
}

template <int kLanes>
inline void scatter_lanes(const float* lanes, const uint32_t* row, int64_t n, float* y) {
  for (int64_t lane = 0; lane < kLanes; ++lane)
    if (row[lane] < n) y[row[lane]] = lanes[lane];
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
  constexpr bool kLong = kActivation == fs::Activation::gelu || kActivation == fs::Activation::silu;
  // Without a bias -0.0 is added, which changes nothing, not even the sign of a zero.
  const S::F no_bias = S::set1(-0.0f);
  int64_t i = 0;
  for (; i + S::kWidth <= f.count; i += S::kWidth) {
    const S::F z = S::add(S::load(f.sum + i), f.bias ? S::load(f.bias + i) : no_bias);
    if (kLong && f.z != nullptr) S::store(f.z + i, z);
    S::store(f.y + i, activate<kActivation>(z));
  }
  if (i < f.count) {
    const int n = static_cast<int>(f.count - i);
    const S::F bias = f.bias ? S::load_n(f.bias + i, n) : no_bias;
    const S::F z = S::add(S::load_n(f.sum + i, n), bias);
    if (kLong && f.z != nullptr) S::store_n(f.z + i, z, n);
    S::store_n(f.y + i, activate<kActivation>(z), n);
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

template <fs::Activation kActivation>
void finish_columns_with(const ColumnsArgs& a) {
  using S = Simd;
  constexpr int kW = S::kWidth;
  constexpr bool kShort = kActivation == fs::Activation::none || kActivation == fs::Activation::relu;
  const S::F no_bias = S::set1(-0.0f);
  for (int64_t r = 0; r < a.rows; r += kW) {
    const int rows = a.rows - r < kW ? static_cast<int>(a.rows - r) : kW;
    for (int64_t c = 0; c < a.columns; c += kW) {
      const int columns = a.columns - c < kW ? static_cast<int>(a.columns - c) : kW;
      S::F bias = no_bias;
      if (a.bias != nullptr) bias = columns == kW ? S::load(a.bias + c) : S::load_n(a.bias + c, columns);
      const float* const sums = a.sums + c * a.lanes + r;
      float* const y = a.y + r * a.y_stride + c;
      if (kShort && rows == kW && columns == kW) {
        transpose_tile(sums, a.lanes, [&](int64_t i, S::F v) {
          S::store(y + i * a.y_stride, activate<kActivation>(S::add(v, bias)));
        });
        continue;
      }
      float tile[kW * kW];
      transpose_tile(sums, a.lanes, [&](int64_t i, S::F v) { S::store(tile + i * kW, v); });
      for (int64_t i = 0; i < rows; ++i) {
        const S::F z = S::add(S::load(tile + i * kW), bias), v = activate<kActivation>(z);
        if (!kShort && a.z != nullptr) {
          float* const to = a.z + (r + i) * a.y_stride + c;
          if (columns == kW)
            S::store(to, z);
          else
            S::store_n(to, z, columns);
        }
        if (columns == kW)
          S::store(y + i * a.y_stride, v);
        else
          S::store_n(y + i * a.y_stride, v, columns);
      }
    }
  }
}

template <fs::Activation kActivation>
void activation_grad_with(const ActivationGradArgs& a) {
  using S = Simd;
  int64_t i = 0;
  for (; i + S::kWidth <= a.count; i += S::kWidth)
    S::store(a.out + i, times_derivative<kActivation>(S::load(a.grad + i), S::load(a.saved + i)));
  if (i < a.count) {
    const int n = static_cast<int>(a.count - i);
    S::store_n(a.out + i, times_derivative<kActivation>(S::load_n(a.grad + i, n), S::load_n(a.saved + i, n)), n);
  }
}

void activation_grad_block(const ActivationGradArgs& a) {
  switch (a.activation) {
    case fs::Activation::none: return activation_grad_with<fs::Activation::none>(a);
    case fs::Activation::relu: return activation_grad_with<fs::Activation::relu>(a);
    case fs::Activation::gelu: return activation_grad_with<fs::Activation::gelu>(a);
    case fs::Activation::silu: return activation_grad_with<fs::Activation::silu>(a);
  }
}

void finish_columns(const ColumnsArgs& a) {
  switch (a.activation) {
    case fs::Activation::none: return finish_columns_with<fs::Activation::none>(a);
    case fs::Activation::relu: return finish_columns_with<fs::Activation::relu>(a);
    case fs::Activation::gelu: return finish_columns_with<fs::Activation::gelu>(a);
    case fs::Activation::silu: return finish_columns_with<fs::Activation::silu>(a);
  }
}

}  // namespace
