// What an epilogue may apply to its results. No STL: ISA files include this.
#pragma once

namespace fs {

enum class Activation : int { none, relu, gelu, silu };  // gelu: the exact one, x * Phi(x)

}  // namespace fs
