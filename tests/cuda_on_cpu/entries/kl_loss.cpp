// The launchers of csrc/kl_loss/cuda as plain C functions for ctypes.
#include "../../../csrc/kl_loss/cuda/sm80.h"
#include "../runtime/entry.h"

namespace sm80 = fs::kl_loss::sm80;

namespace {

fs::kl_loss::RowsArgs rows_args(const void* student, const void* teacher, int dtype, int64_t student_stride,
                                int64_t teacher_stride, int64_t rows, int64_t classes, double temperature, void* grad) {
  fs::kl_loss::RowsArgs a{};
  a.student = student;
  a.teacher = teacher;
  a.dtype = static_cast<fs::DType>(dtype);
  a.student_stride = student_stride;
  a.teacher_stride = teacher_stride;
  a.rows = rows;
  a.classes = classes;
  a.temperature = temperature;
  a.grad = grad;
  return a;
}

}  // namespace

extern "C" {

FS_ENTRY int64_t kl_loss_scratch_bytes(int64_t rows) { return sm80::scratch_bytes(rows); }

FS_ENTRY const char* kl_loss_kl_div(const void* student, const void* teacher, int dtype, int64_t student_stride,
                                    int64_t teacher_stride, int64_t rows, int64_t classes, double temperature,
                                    double divisor, float* row_loss, float* total, void* grad, void* scratch) {
  return fs::simt::guarded([&] {
    fs::kl_loss::LossArgs args{};
    args.rows = rows_args(student, teacher, dtype, student_stride, teacher_stride, rows, classes, temperature, grad);
    args.rows.kl_weight = temperature / divisor;
    args.row_loss = row_loss;
    args.row_scale = temperature * temperature / divisor;
    sm80::kl_div(args, total, scratch, nullptr);
  });
}

FS_ENTRY const char* kl_loss_distill_loss(const void* student, const void* teacher, int dtype, int64_t student_stride,
                                          int64_t teacher_stride, int64_t rows, int64_t classes, double temperature,
                                          const int64_t* target, int64_t ignore_index, double alpha, float* means,
                                          void* grad, void* scratch) {
  return fs::simt::guarded([&] {
    fs::kl_loss::RowsArgs a =
        rows_args(student, teacher, dtype, student_stride, teacher_stride, rows, classes, temperature, grad);
    a.target = target;
    a.ignore_index = ignore_index;
    a.kl_weight = alpha * temperature;
    a.ce_weight = 1 - alpha;
    sm80::distill_loss(a, alpha, {means, means + 1, means + 2}, scratch, nullptr);
  });
}
}
