// kl_loss in plain C: what every level does, bit for bit.
#include "../../runtime/simd/scalar.h"
#include "loss.inl"

const Kernels fs::kl_loss::kScalar = {"scalar", fs::isa::Level::scalar, fs::isa::kLevelScalar, S::kWidth, &rows};
