// The steps of weight_only_linear round its tiles, once for every level: included after elementwise.inl.
#include "../weight_only.h"

namespace {

template <class T>
void quantize_groups_as(const GroupQuantizeArgs& a) {
  using S = Simd;
  for (int64_t r = 0; r < a.rows; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
    int64_t g = 0;
    for (int64_t k = 0; k < a.k; k += a.group, ++g) {
      const int64_t count = a.k - k < a.group ? a.k - k : a.group;
      int8_t* codes = a.codes + k / kBlockK * a.block_stride + r * kBlockK + k % kBlockK;
      float* scale = a.scale + g * a.group_stride + r;
      const bool finite = row_scale(absmax_bits(x + k, count), scale);
      const S::F inverse = S::set1(finite ? 1.0f / *scale : 0.0f);
      S::I sum = S::set1_s32(0);
      const auto code = [&](int64_t i) {
        const S::I q =
            finite ? dynamic_code(load_up_to(x + k + i, static_cast<int>(count - i)), inverse) : S::set1_s32(0);
        sum = S::add_s32(sum, q);
        return q;
      };
      for (int64_t i = 0; i < a.group; i += kGroup) {  // a group of 32 is less than one store of AVX-512
        const S::I q0 = code(i), q1 = code(i + S::kWidth);
        const S::I q2 = code(i + 2 * S::kWidth), q3 = code(i + 3 * S::kWidth);
        if (a.group - i >= kGroup) {
          S::store_s8(codes + i, S::pack_s8(q0, q1, q2, q3));
        } else {
          int8_t part[kGroup];
          S::store_s8(part, S::pack_s8(q0, q1, q2, q3));
          memcpy(codes + i, part, static_cast<size_t>(a.group - i));
        }
      }
      int32_t lanes[S::kWidth], total = 0;
      memcpy(lanes, &sum, sizeof lanes);
      for (const int32_t lane : lanes) total += lane;
      a.sum[g * a.group_stride + r] = total;
    }
    for (int64_t k = g * a.group; k % kBlockK != 0; k += 32)  // groups are multiples of 32
      memset(a.codes + k / kBlockK * a.block_stride + r * kBlockK + k % kBlockK, 0, 32);
  }
}

void quantize_groups(const GroupQuantizeArgs& a) {
  switch (a.dtype) {
    case DType::f32: return quantize_groups_as<float>(a);
    case DType::bf16: return quantize_groups_as<fs::bf16>(a);
    case DType::f16: return quantize_groups_as<fs::f16>(a);
  }
}

template <Activation kActivation, class T>
void finish_as(const FinishArgs& f) {
  using S = Simd;
  for (int64_t r = 0; r < f.rows; ++r) {
    const float* acc = f.acc + r * kWeightOnlyColumns;
    T* y = static_cast<T*>(f.y) + r * f.y_stride;
    const S::F no_bias = S::set1(-0.0f);  // changes nothing, not even the sign of a zero
    int64_t j = 0;
    for (; j + S::kWidth <= f.columns; j += S::kWidth)
      S::store(y + j, activate<kActivation>(S::add(S::load(acc + j), f.bias ? S::load(f.bias + j) : no_bias)));
    if (j < f.columns) {
      const int n = static_cast<int>(f.columns - j);
      S::store_n(y + j,
                 activate<kActivation>(S::add(S::load_n(acc + j, n), f.bias ? S::load_n(f.bias + j, n) : no_bias)), n);
    }
  }
}

template <Activation kActivation>
void finish_with(const FinishArgs& f) {
  switch (f.dtype) {
    case DType::f32: return finish_as<kActivation, float>(f);
    case DType::bf16: return finish_as<kActivation, fs::bf16>(f);
    case DType::f16: return finish_as<kActivation, fs::f16>(f);
  }
}

void finish(const FinishArgs& f) {
  switch (f.activation) {
    case Activation::none: return finish_with<Activation::none>(f);
    case Activation::relu: return finish_with<Activation::relu>(f);
    case Activation::gelu: return finish_with<Activation::gelu>(f);
    case Activation::silu: return finish_with<Activation::silu>(f);
  }
}

}  // namespace
