// kl_loss, AVX-512 (F, BW, VL, DQ).
// Idea     as cpu/avx2.cpp; a group of 16 lanes is one vector.
// Measured not yet on hardware: its bits were compared with the scalar row's (docs/kernels/kl_loss.md).
#include "../../runtime/simd/avx512.h"
#include "loss.inl"

const Kernels fs::kl_loss::kAvx512 = {
    "avx512", fs::isa::Level::avx512,
    fs::isa::kLevelAvx2 | fs::isa::kAvx512F | fs::isa::kAvx512BW | fs::isa::kAvx512VL | fs::isa::kAvx512DQ, S::kWidth,
    &rows};
