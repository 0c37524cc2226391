// The activation of an epilogue, chosen at compile time. Included after one of simd/{scalar,avx2,avx512}.h.
#pragma once
#include "../activation.h"
#include "math.inl"

namespace {

template <fs::Activation kActivation>
inline Simd::F activate(Simd::F y) {
  if constexpr (kActivation == fs::Activation::relu) return relu(y);
  if constexpr (kActivation == fs::Activation::gelu) return gelu(y);
  if constexpr (kActivation == fs::Activation::silu) return silu(y);
  return y;
}

// act'(z) times the gradient of y; of relu y in the place of z (0 where y is 0; a NaN hands the gradient on, as
// torch's).
template <fs::Activation kActivation>
inline Simd::F times_derivative(Simd::F grad, Simd::F saved) {
  if constexpr (kActivation == fs::Activation::relu) return Simd::zero_where_equal(saved, Simd::set1(0.0f), grad);
  if constexpr (kActivation == fs::Activation::gelu) return Simd::mul(grad, gelu_derivative(saved));
  if constexpr (kActivation == fs::Activation::silu) return Simd::mul(grad, silu_derivative(saved));
  return grad;
}

}  // namespace
