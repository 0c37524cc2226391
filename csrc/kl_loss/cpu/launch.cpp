// Threads, scratch and the reduction of kl_loss; knows no ISA.
#include <algorithm>

#include "../../runtime/parallel.h"
#include "../../runtime/workspace.h"
#include "../kl_loss.h"
#include "../select.h"

namespace fs::kl_loss {
namespace {

int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
int64_t grad_bytes(DType dtype) { return dtype == DType::bf16 ? 2 : 4; }

// Rows [begin, end) of `all`.
RowsArgs part(const RowsArgs& all, int64_t begin, int64_t end) {
  RowsArgs a = all;
  a.rows = end - begin;
  a.student = static_cast<const char*>(all.student) + begin * all.student_stride * element_bytes(all.dtype);
  a.teacher = static_cast<const char*>(all.teacher) + begin * all.teacher_stride * element_bytes(all.dtype);
  if (all.target != nullptr) a.target = all.target + begin;
  a.kl = all.kl + begin;
  a.ce = all.ce + begin;
  if (all.grad != nullptr) a.grad = static_cast<char*>(all.grad) + begin * all.classes * grad_bytes(all.dtype);
  const int64_t floats = kept_floats(all.classes, all.grad != nullptr);
  a.kept = floats == 0 ? nullptr : reinterpret_cast<float*>(scratch(static_cast<size_t>(floats) * sizeof(float)));
  return a;
}

}  // namespace

Sums loss(const Kernels& kernels, const LossArgs& args) {
  RowsArgs all = args.rows;
  all.kl =
      reinterpret_cast<double*>(scratch<1>(static_cast<size_t>(std::max<int64_t>(2 * all.rows, 1)) * sizeof(double)));
  all.ce = all.kl + all.rows;
  all.stream = all.grad != nullptr && stream(all.rows * all.classes * grad_bytes(all.dtype));
  const int64_t threads = std::min(threads_for(all.rows * all.classes, num_threads()), all.rows);
  if (threads <= 1) {
    if (all.rows > 0) kernels.rows(part(all, 0, all.rows));
  } else {
    const int64_t share = (all.rows + threads - 1) / threads;
    parallel_for((all.rows + share - 1) / share, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernels.rows(part(all, i * share, std::min((i + 1) * share, all.rows)));
    });
  }
  Sums sums{0, 0};
  for (int64_t r = 0; r < all.rows; ++r) {
    sums.kl += all.kl[r];
    if (all.target != nullptr) sums.ce += all.ce[r];
    if (args.row_loss != nullptr) args.row_loss[r] = static_cast<float>(all.kl[r] * args.row_scale);
  }
  return sums;
}

}  // namespace fs::kl_loss
