// The kernel's own time, without the dispatcher and without page faults: what bandwidth is held against.
#include <stdexcept>
#include <vector>

#include "../../families.h"
#include "../../runtime/timing.h"
#include "../select.h"

namespace fs {

double time_kl_div(int64_t rows, int64_t classes, int64_t repeats) {
  if (rows < 1 || classes < 1 || repeats < 1)
    throw std::invalid_argument("time_kl_div: rows, classes and repeats must be positive");
  const auto count = static_cast<size_t>(rows * classes);
  std::vector<float> student(count), teacher(count), grad(count);
  for (size_t i = 0; i < count; ++i) {
    student[i] = static_cast<float>(i * 7919 % 1009) * 0.005f;
    teacher[i] = static_cast<float>(i * 104729 % 1013) * 0.005f;
  }
  kl_loss::LossArgs args{};
  kl_loss::RowsArgs& a = args.rows;
  a.student = student.data();
  a.teacher = teacher.data();
  a.dtype = kl_loss::DType::f32;
  a.student_stride = a.teacher_stride = a.classes = classes;
  a.rows = rows;
  a.temperature = 2.0;
  a.grad = grad.data();
  a.kl_weight = 1.0 / static_cast<double>(rows);
  const kl_loss::Kernels& kernels = kl_loss::select();
  return seconds_a_call(1, repeats, [&](int64_t count) {
    for (int64_t i = 0; i < count; ++i) kl_loss::loss(kernels, args);
  });
}

}  // namespace fs
