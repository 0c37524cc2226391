// qdq, AVX2 (with FMA, F16C): elementwise.inl over 8 lanes.
// Group    32 elements: four vectors become one store of 32 codes.
// Reads    unaligned; a row's tail through a small buffer on the stack, so nothing is read past its end.
// Bound    memory: 5 bytes an element (quantize), 8 (fake_quantize), 16 1/4 forward and backward.
// Measured docs/kernels/qdq.md
#include "../../runtime/simd/avx2.h"

#include "elementwise.inl"

const Kernels fs::qdq::kAvx2 = kernels("avx2", fs::isa::Level::avx2, fs::isa::kLevelAvx2);
