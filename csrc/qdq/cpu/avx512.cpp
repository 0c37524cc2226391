// qdq, AVX-512 (F, BW, VL, DQ): elementwise.inl over 16 lanes.
// Group    64 elements: four vectors become one store of 64 codes, a whole line where it is streamed.
// Reads    unaligned; tails under a write or read mask.
// Bound    memory, as avx2.cpp.
// Measured docs/kernels/qdq.md
#include "../../runtime/simd/avx512.h"

#include "elementwise.inl"

const Kernels fs::qdq::kAvx512 = kernels("avx512", fs::isa::Level::avx512, fs::isa::kLevelAvx512);
