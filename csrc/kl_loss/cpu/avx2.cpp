// kl_loss, AVX2 (with FMA, F16C).
// Idea     one pass with running maxima; exponentials stay in scratch for the gradient. A chunk of 1024 is read from L1
// by
//          short loops: range, student's exponentials, teacher's with the weighted sum.
// Tile     exponentials of 4 vectors at once hide the latency of fma; with sums to keep, 2 vectors.
// Tails    the last group of a row is padded with masked logits in a copy; nothing beyond a row is read or written.
// Bound    per 8 logits 23 fma, mul, max, min (32 with the cross-entropy at its own temperature), 12 bytes each.
// Measured docs/kernels/kl_loss.md
#include "../../runtime/simd/avx2.h"
#include "loss.inl"

const Kernels fs::kl_loss::kAvx2 = {"avx2", fs::isa::Level::avx2, fs::isa::kLevelAvx2, S::kWidth, &rows};
