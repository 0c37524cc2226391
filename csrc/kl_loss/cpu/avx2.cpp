// kl_loss, AVX2 (with FMA, F16C).
// Idea     one pass with running maxima; exponentials of rows up to 16384 logits stay in L2 for the gradient.
// Tile     a group of 16 lanes = 2 vectors; 6 sums (8 with the cross-entropy at its own temperature).
// Tails    the last group of a row is padded with masked logits in a copy; nothing beyond a row is read or written.
// Bound    per 8 logits about 13 fma or mul and 16 add, sub, max, compare; 96 bytes of traffic.
// Measured docs/kernels/kl_loss.md
#include "../../runtime/simd/avx2.h"
#include "loss.inl"

const Kernels fs::kl_loss::kAvx2 = {"avx2", fs::isa::Level::avx2, fs::isa::kLevelAvx2, S::kWidth, &rows};
