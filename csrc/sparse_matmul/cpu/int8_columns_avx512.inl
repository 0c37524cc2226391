// Kernels::finish_columns, of both AVX-512 rows: sums of 16 rows of x and 16 outputs are transposed in registers and
// become y there, so that they go through memory once. The bits are those of int8_gemm's epilogue.
#include "../../runtime/simd/avx512.h"
//
#include "../../runtime/simd/activate.inl"
#include "../../runtime/simd/transpose16_avx512.inl"

namespace {

template <fs::Activation kActivation>
void finish_columns_with(const ColumnsArgs& a) {
  using S = Simd;
  constexpr int kW = S::kWidth;
  constexpr bool kShort = kActivation == fs::Activation::none || kActivation == fs::Activation::relu;
  const S::F no_bias = S::set1(-0.0f);  // changes nothing, not even the sign of a zero
  for (int64_t r = 0; r < a.rows; r += kW) {
    const int rows = a.rows - r < kW ? static_cast<int>(a.rows - r) : kW;
    const float* const x_scale = a.x_scale + r;
    for (int64_t c = 0; c < a.columns; c += kW) {
      const int columns = a.columns - c < kW ? static_cast<int>(a.columns - c) : kW;
      const bool whole = columns == kW;
      const S::F scale = whole ? S::load(a.weight_scale + c) : S::load_n(a.weight_scale + c, columns);
      S::F bias = no_bias;
      if (a.bias != nullptr) bias = whole ? S::load(a.bias + c) : S::load_n(a.bias + c, columns);
      const auto result = [&](int64_t i, S::F sum) {
        const S::F y = S::fma(S::to_f32(_mm512_castps_si512(sum)), S::mul(S::set1(x_scale[i]), scale), bias);
        return activate<kActivation>(y);
      };
      const auto* const sums = reinterpret_cast<const float*>(a.sums + c * a.lanes + r);
      float* const y = a.y + r * a.y_stride + c;
      if (kShort && rows == kW && whole) {
        transpose_tile(sums, a.lanes, [&](int64_t i, S::F sum) { S::store(y + i * a.y_stride, result(i, sum)); });
        continue;
      }
      float tile[kW * kW];
      transpose_tile(sums, a.lanes, [&](int64_t i, S::F sum) { S::store(tile + i * kW, sum); });
      for (int64_t i = 0; i < rows; ++i) {
        const S::F v = result(i, S::load(tile + i * kW));
        if (whole)
          S::store(y + i * a.y_stride, v);
        else
          S::store_n(y + i * a.y_stride, v, columns);
      }
    }
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
