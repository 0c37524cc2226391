// kl_loss on CUDA, sm_80 and later: the launchers. Torch-free; pointers are device pointers, `stream` a cudaStream_t.
//
// The values are those of ../kl_loss.h, within 2e-5 of the loss (4e-6 if exp2f is precise; a device's may be wrong by
// two units in the last place) and 4e-6 of p(s) + p(t) for a gradient; the bits are not those of the CPU. They do not
// depend on the order in which blocks run: no atomics. Targets can't be checked before the launch, so one that is
// neither in [0, classes) nor ignore_index makes its row's ce and gradient NaN; nothing outside is read.
#pragma once
#include <cstdint>

#include "../kl_loss.h"

namespace fs::kl_loss::sm80 {

inline constexpr const char* kName = "sm80";
// No hardware has run these kernels yet: they are off unless FASTSPARSE_UNPROVEN=1 (docs/gpu-status.md).
inline constexpr bool kProven = false;

// Bytes of scratch, at a multiple of 8, that so many rows need.
int64_t scratch_bytes(int64_t rows);

// rows.grad has its weights in args.rows; rows.kl and rows.ce are made of scratch; stream and kept are not read.
// row_loss[r] = kl[r] * row_scale, if row_loss is not null; *total = sum(kl) * row_scale, if total is not null.
void kl_div(const LossArgs& args, float* total, void* scratch, void* stream);

// With n = max(1, the number of targets that are not ignore_index): *kl = sum(kl) * T^2 / n, *ce = sum(ce) / n,
// *loss = alpha * *kl + (1 - alpha) * *ce. rows.kl_weight and rows.ce_weight are divided by n on the device.
struct Means {
  float *loss, *kl, *ce;
};
void distill_loss(const RowsArgs& rows, double alpha, const Means& means, void* scratch, void* stream);

}  // namespace fs::kl_loss::sm80
