// kl_loss: the contract of every kernel of the family. Read this first. Torch-free.
//
// A row is C logits s of the student, t of the teacher; T the temperature; p(x) = softmax(x / T).
//   kl[row]  sum_c p(t)_c (log p(t)_c - log p(s)_c)                     without the factor T^2
//   ce[row]  log sum_c e^(s_c) - s[target]                              only if there are targets; temperature 1
//   grad     kl_weight * (p(s) - p(t)) + ce_weight * (softmax(s) - onehot(target)), in grad's type, rounded once
// The launcher chooses the weights so that grad is the gradient of the reduced loss.
//
// Values that are not finite
//   t = -inf            p(t) = 0 exactly; the class adds 0 to kl, whatever s is there
//   s = -inf            p(s) = 0 exactly; kl is +inf where t is finite there. s[target] = -inf: ce is +inf
//   NaN, +inf, a row of -inf only: kl (and ce, if in s) and the whole row of grad are NaN
//   target = ignored    nothing of the row is read; kl = ce = 0 and grad 0
//
// One pass with running maxima over chunks of kChunk logits: exponentials relative to the maximum so far, sums in
// float32 over kLanes lanes (element i in lane i % kLanes) flushed to double once a chunk, rescaled when the maximum
// grows. A chunk whose exponentials are all above 2^-124 needs no clamps and no masks. Rows of at most kKept logits
// keep their exponentials in scratch for grad; longer ones compute them again. Where kl < kSmall, the difference of
// logarithms has lost its digits, and kl is summed once more in the Bregman form sum_c p(t) (e^-d - 1 + d), d = log
// p(t) - log p(s): every term >= 0, so nothing cancels, and d is computed from t - s without its rounding, so that a
// small kl is within 4e-6 of float64 also where t and s lie apart by a constant.
//
// Exactness: every level has the same lanes and rounds at the same places, so all results are bit-equal between
// levels, and they do not depend on the number of threads. Nothing is read or written outside the stated ranges.
#pragma once
#include <stdint.h>

#include "../runtime/dtype.h"
#include "../runtime/features.h"

namespace fs::kl_loss {

using fs::DType;

inline constexpr int kLanes = 16;
inline constexpr int64_t kChunk = 1024;
inline constexpr int64_t kKept = 256 * kChunk;  // 3 floats a logit of scratch: at most 3 MB a thread
inline constexpr int64_t kMaxKeptChunks = kKept / kChunk;
inline constexpr double kSmall = 0.1;

struct RowsArgs {
  const void* student;  // [rows, classes] of dtype, rows student_stride elements apart
  const void* teacher;
  DType dtype;
  int64_t student_stride, teacher_stride;
  int64_t rows, classes;  // classes >= 1
  double temperature;     // finite, > 0
  const int64_t* target;  // [rows], each in [0, classes) or ignore_index; null: no cross-entropy
  int64_t ignore_index;
  double* kl;  // [rows], written
  double* ce;  // [rows], written; unused without targets
  void* grad;  // [rows, classes], contiguous, bf16 if dtype is bf16, else f32; null: not wanted
  double kl_weight, ce_weight;
  bool stream;  // grad past the caches: it is larger than they are
  float* kept;  // scratch of kept_floats(classes, ...), aligned to 64; null: exponentials are computed again
};

// Floats of scratch that rows of so many classes want; 0 where exponentials are computed again.
inline int64_t kept_floats(int64_t classes, bool grad) {
  return !grad || classes > kKept ? 0 : 3 * ((classes + kLanes - 1) / kLanes * kLanes);
}

struct Kernels {
  const char* name;
  isa::Level level;
  uint32_t features;
  int width;  // floats of a vector
  void (*rows)(const RowsArgs&);
};

// One per ISA file (cpu/<level>.cpp).
extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// cpu/launch.cpp: threads, scratch, the reduction. `kernels` is what select() chose before work is split.
struct LossArgs {
  RowsArgs rows;    // all of them; stream and kept are set by the launcher, weights as above
  float* row_loss;  // [rows] or null: kl[row] * row_scale
  double row_scale;
};

struct Sums {
  double kl, ce;  // over all rows, added in their order
};

Sums loss(const Kernels& kernels, const LossArgs& args);

}  // namespace fs::kl_loss
