// The steps round a tile: quantize and widen into an A panel, and the epilogue. One body for every level; the level
// brings simd/<level>.h before this and, after it, `struct Panel`:
//   kBytes                        bytes of an element of an A panel
//   kOffset                       what an element is more than x_q
//   store4(p, q0, q1, q2, q3)     4 vectors of s32 in [-128, 127] -> 4 * kWidth elements
//   store4(p, const int8_t* a)    4 * kWidth s8 -> as many elements
#include <string.h>

#include "../../qdq/cpu/rows.inl"
#include "../../runtime/simd/activate.inl"
#include "../int8_gemm.h"

namespace {

using namespace fs::int8_gemm;

constexpr int kGroup = 4 * Simd::kWidth;  // elements of one store4

// Calls full(k, p) for each whole group of a row and rest(k, p, count) for what is left, p where it goes in the panel.
template <class Full, class Rest>
inline void for_each_group(uint8_t* row, int64_t block_stride, int64_t k, const Full& full, const Rest& rest) {
  constexpr int64_t block = kBlockBytes / Panel::kBytes;
  static_assert(block % kGroup == 0, "a group lies in one block");
  for (int64_t begin = 0; begin < k; begin += block, row += block_stride) {
    const int64_t end = begin + block < k ? begin + block : k;
    int64_t i = begin;
    for (; i + kGroup <= end; i += kGroup) full(i, row + (i - begin) * Panel::kBytes);
    if (i < end) rest(i, row + (i - begin) * Panel::kBytes, static_cast<int>(end - i));
  }
}

// codes(x vector) -> s32 vector, over a row into its panel.
template <class T, class Codes>
inline void write_codes(const T* x, uint8_t* row, int64_t block_stride, int64_t k, const Codes& codes) {
  using S = Simd;
  for_each_group(
      row, block_stride, k,
      [&](int64_t i, uint8_t* p) {
        Panel::store4(p, codes(S::load(x + i)), codes(S::load(x + i + S::kWidth)),
                      codes(S::load(x + i + 2 * S::kWidth)), codes(S::load(x + i + 3 * S::kWidth)));
      },
      [&](int64_t i, uint8_t* p, int count) {
        constexpr int w = S::kWidth;
        Panel::store4(p, codes(load_up_to(x + i, count)), codes(load_up_to(x + i + w, count - w)),
                      codes(load_up_to(x + i + 2 * w, count - 2 * w)), codes(load_up_to(x + i + 3 * w, count - 3 * w)));
      });
}

// Rows whose scales are computed before any of their codes: what comes after a row's last maximum, two divisions among
// it, is hidden behind the next row. So many as stay in L1.
constexpr int kRowsAhead = 8;
constexpr int64_t kRowsAheadBytes = 16 << 10;

template <class T>
void quantize_dynamic(const QuantizeArgs& a) {
  using S = Simd;
  const int64_t fit = kRowsAheadBytes / static_cast<int64_t>(sizeof(T)) / (a.k > 0 ? a.k : 1);
  const int64_t step = fit < 1 ? 1 : fit > kRowsAhead ? kRowsAhead : fit;
  for (int64_t begin = 0; begin < a.rows; begin += step) {
    const int64_t end = begin + step < a.rows ? begin + step : a.rows;
    bool finite[kRowsAhead];
    const T* x = static_cast<const T*>(a.x);
    for (int64_t r = begin; r < end; ++r)
      finite[r - begin] = row_scale(absmax_bits(x + r * a.x_stride, a.k), a.scale + r);
    for (int64_t r = begin; r < end; ++r) {
      uint8_t* row = a.panel + r * kRowStride;
      if (!finite[r - begin]) {  // the whole row of y becomes NaN
        write_codes(x + r * a.x_stride, row, a.block_stride, a.k, [](S::F) { return S::set1_s32(0); });
        continue;
      }
      const S::F inverse = S::set1(1.0f / a.scale[r]);
      write_codes(x + r * a.x_stride, row, a.block_stride, a.k, [=](S::F v) { return dynamic_code(v, inverse); });
    }
  }
}

template <class T>
void quantize_static(const QuantizeArgs& a) {
  using S = Simd;
  const S::F inverse = S::set1(1.0f / a.static_scale);
  const S::I zero_point = S::set1_s32(a.static_zero_point);
  const S::I lowest = S::set1_s32(-128), highest = S::set1_s32(127);
  for (int64_t r = 0; r < a.rows; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
    a.scale[r] = a.static_scale;
    write_codes(x, a.panel + r * kRowStride, a.block_stride, a.k,
                [=](S::F v) { return S::max_s32(lowest, S::min_s32(highest, static_code(v, inverse, zero_point))); });
  }
}

template <class T>
void quantize_as(const QuantizeArgs& a) {
  if (a.dynamic)
    quantize_dynamic<T>(a);
  else
    quantize_static<T>(a);
}

void quantize(const QuantizeArgs& a) {
  switch (a.dtype) {
    case DType::f32: return quantize_as<float>(a);
    case DType::bf16: return quantize_as<fs::bf16>(a);
    case DType::f16: return quantize_as<fs::f16>(a);
  }
}

void widen(const WidenArgs& w) {
  for (int64_t r = 0; r < w.rows; ++r) {
    const int8_t* a = w.a + r * w.a_stride;
    for_each_group(
        w.panel + r * kRowStride, w.block_stride, w.k, [&](int64_t i, uint8_t* p) { Panel::store4(p, a + i); },
        [&](int64_t i, uint8_t* p, int count) {
          int8_t rest[kGroup] = {};
          memcpy(rest, a + i, static_cast<size_t>(count));
          Panel::store4(p, rest);
        });
  }
}

// put(row, j, y, count) takes each vector of float32 results: `count` of them, from column j on. T: of the residual.
// Columns outside, rows inside: what belongs to columns stays in registers.
template <Activation kActivation, class T, class Put>
inline void for_each_result(const EpilogueArgs& e, const Put& put) {
  using S = Simd;
  struct Columns {
    S::F weight_scale, bias;
  };
  // Without a bias -0.0 is added, which changes nothing, not even the sign of a zero.
  const auto columns_at = [&](int64_t j) {
    return Columns{S::load(e.weight_scale + j), e.bias ? S::load(e.bias + j) : S::set1(-0.0f)};
  };
  const T* residual = static_cast<const T*>(e.residual);
  const auto result = [&](const Columns& c, int64_t r, int64_t j) {
    const S::I sum = S::load_s32(e.acc + r * kMaxTileColumns + j);
    S::F y = S::fma(S::to_f32(sum), S::mul(S::set1(e.x_scale[r]), c.weight_scale), c.bias);
    if (residual) y = S::add(y, S::load(residual + r * e.residual_stride + j));
    put(r, j, activate<kActivation>(y), S::kWidth);
  };
  int64_t j = 0;
  for (; j + 2 * S::kWidth <= e.columns; j += 2 * S::kWidth) {
    const Columns first = columns_at(j), second = columns_at(j + S::kWidth);
    for (int64_t r = 0; r < e.rows; ++r) {
      result(first, r, j);
      result(second, r, j + S::kWidth);
    }
  }
  for (; j + S::kWidth <= e.columns; j += S::kWidth) {
    const Columns c = columns_at(j);
    for (int64_t r = 0; r < e.rows; ++r) result(c, r, j);
  }
  if (j == e.columns) return;
  const int n = static_cast<int>(e.columns - j);
  const Columns c{S::load_n(e.weight_scale + j, n), e.bias ? S::load_n(e.bias + j, n) : S::set1(-0.0f)};
  for (int64_t r = 0; r < e.rows; ++r) {
    const S::I sum = S::load_s32_n(e.acc + r * kMaxTileColumns + j, n);
    S::F y = S::fma(S::to_f32(sum), S::mul(S::set1(e.x_scale[r]), c.weight_scale), c.bias);
    if (residual) y = S::add(y, S::load_n(residual + r * e.residual_stride + j, n));
    put(r, j, activate<kActivation>(y), n);
  }
}

template <Activation kActivation, class T>
void epilogue_as(const EpilogueArgs& e) {
  using S = Simd;
  if (e.requantize) {
    const S::F inverse = S::set1(1.0f / e.y_scale);
    const S::I zero_point = S::set1_s32(e.y_zero_point);
    for_each_result<kActivation, T>(e, [&](int64_t r, int64_t j, S::F y, int count) {
      int8_t* p = static_cast<int8_t*>(e.y) + r * e.y_stride + j;
      const S::I code = static_code(y, inverse, zero_point);
      if (count == S::kWidth)
        S::store_as_s8(p, code);
      else
        S::store_as_s8_n(p, code, count);
    });
    return;
  }
  for_each_result<kActivation, T>(e, [&](int64_t r, int64_t j, S::F y, int count) {
    T* p = static_cast<T*>(e.y) + r * e.y_stride + j;
    if (count == S::kWidth)
      S::store(p, y);
    else
      S::store_n(p, y, count);
  });
}

template <Activation kActivation>
void epilogue_with(const EpilogueArgs& e) {
  switch (e.dtype) {
    case DType::f32: return epilogue_as<kActivation, float>(e);
    case DType::bf16: return epilogue_as<kActivation, fs::bf16>(e);
    case DType::f16: return epilogue_as<kActivation, fs::f16>(e);
  }
}

void epilogue(const EpilogueArgs& e) {
  switch (e.activation) {
    case Activation::none: return epilogue_with<Activation::none>(e);
    case Activation::relu: return epilogue_with<Activation::relu>(e);
    case Activation::gelu: return epilogue_with<Activation::gelu>(e);
    case Activation::silu: return epilogue_with<Activation::silu>(e);
  }
}

}  // namespace
