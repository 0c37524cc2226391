// The activations of an epilogue.
#pragma once
#include "../activation.h"
#include "device.h"

namespace fs {

__device__ __forceinline__ float activate(Activation activation, float y) {
  switch (activation) {
    case Activation::relu: return y < 0.0f ? 0.0f : y;
    case Activation::gelu: return y * 0.5f * erfcf(-0.707106781f * y);
    case Activation::silu: return y / (1.0f + expf(-y));
    default: return y;
  }
}

}  // namespace fs
