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

}  // namespace
