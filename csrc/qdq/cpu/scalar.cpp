// qdq, scalar: the level that every machine runs, and the plainest statement of what the others compute.
// Measured docs/kernels/qdq.md; it is there to be right, not fast.
#include "../../runtime/simd/scalar.h"

#include "elementwise.inl"

const Kernels fs::qdq::kScalar = kernels("scalar", fs::isa::Level::scalar, fs::isa::kLevelScalar);
