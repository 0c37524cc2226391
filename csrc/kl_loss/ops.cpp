// kl_loss: schemas and tensor checks. The only file of the family that knows torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdio>
#include <tuple>

#include "../runtime/checks.h"
#if defined(FASTSPARSE_WITH_CUDA)
#include "../runtime/cuda/torch_stream.h"
#include "cuda/sm80.h"
#endif
#include "kl_loss.h"
#include "select.h"

namespace fs::kl_loss {
namespace {

constexpr const char* kKl = "kl_div";
constexpr const char* kDistill = "distill_loss";

// The codes of the schema; python/fastsparse/ops/kl_loss.py has the names.
enum Reduction : int64_t { kBatchMean = 0, kSum = 1, kMean = 2, kNone = 3 };

// Each op has one implementation for both devices, which parts at the launch; the entry for CUDA passes this gate
// first. With one argument on CUDA the dispatcher comes there, whichever it is: the checks then say which is not where
// student_logits are.
#if defined(FASTSPARSE_WITH_CUDA)
void check_cuda_kernels(const char* op) { check_proven(op, sm80::kName, sm80::kProven); }

// Calls body(scratch, stream) for the device of x and so many rows.
template <class Body>
void on_cuda(const Tensor& x, int64_t rows, const Body& body) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(x.get_device_index()));
  const int64_t bytes = sm80::scratch_bytes(rows);
  const Tensor scratch = empty(x, &bytes, 1, ScalarType::Byte);
  body(scratch.mutable_data_ptr(), current_cuda_stream(x));
}
#else
void check_cuda_kernels(const char* op) {
  throw std::runtime_error(std::string(op) +
                           ": an argument is on cuda, and this build of fastsparse has no CUDA kernels "
                           "(FASTSPARSE_CUDA=ON makes them)");
}
#endif

// Logits [..., C] as rows; `held` keeps a copy alive where the tensor itself can't be read row by row.
struct Logits {
  Tensor held;
  int64_t stride;
};

Logits as_rows(const Tensor& t) {
  const int64_t dims = t.dim(), classes = t.size(dims - 1);
  // Rows that lie apart by a constant step are read where they are; anything else is copied.
  if (dims == 2 && t.stride(1) == 1 && t.stride(0) >= classes) return {t, t.stride(0)};
  return {as_contiguous(t), classes};
}

struct Checked {
  LossArgs args;
  Logits student, teacher;
};

Checked check_logits(const char* op, const Tensor& student, const Tensor& teacher, double temperature) {
  const DType dtype = float_dtype(op, "student_logits", student);
  check_same_device(op, "teacher_logits", teacher, student);
  check_dtype(op, "teacher_logits", teacher, student.scalar_type());
  const int64_t dims = student.dim();
  if (dims < 1) fail(op, "student_logits must have at least one dimension, got student_logits[]");
  bool same = teacher.dim() == dims;
  for (int64_t i = 0; same && i < dims; ++i) same = teacher.size(i) == student.size(i);
  if (!same)
    fail(op, "teacher_logits must have the shape of " + shape_of("student_logits", student) + ", got " +
                 shape_of("teacher_logits", teacher));
  const int64_t classes = student.size(dims - 1);
  if (classes < 1) fail(op, "student_logits must have at least one class, got " + shape_of("student_logits", student));
  if (!(temperature >= 1e-6 && temperature <= 1e6))
    fail(op, "temperature must be in [1e-6, 1e6], got " + text(temperature));
  Checked c{{}, as_rows(student), as_rows(teacher)};
  RowsArgs& a = c.args.rows;
  a.student = c.student.held.const_data_ptr();
  a.teacher = c.teacher.held.const_data_ptr();
  a.dtype = dtype;
  a.student_stride = c.student.stride;
  a.teacher_stride = c.teacher.stride;
  a.rows = student.numel() / classes;
  a.classes = classes;
  a.temperature = temperature;
  return c;
}

// The gradient's tensor: float16 would lose it, as it is scaled only in backward (GradScaler), so that stays float32.
Tensor grad_like(const Tensor& student) {
  int64_t shape[64];  // torch allows no more dimensions
  for (int64_t i = 0; i < student.dim(); ++i) shape[i] = student.size(i);
  const ScalarType dtype = student.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  return empty(student, shape, student.dim(), dtype);
}

// A result of no dimensions; its value is written behind `float_of`.
Tensor number(const Tensor& like) { return empty(like, nullptr, 0, ScalarType::Float); }
float* float_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// (loss, gradient or the student again where none is wanted)
std::tuple<Tensor, Tensor> kl(const Tensor& student, const Tensor& teacher, double temperature, int64_t reduction,
                              bool want_grad) {
  Checked c = check_logits(kKl, student, teacher, temperature);
  RowsArgs& a = c.args.rows;
  const int64_t dims = student.dim();
  double divisor = 1;
  switch (reduction) {
    case kBatchMean:
      if (dims < 2)
        fail(kKl, "student_logits must have a batch dimension for reduction 'batchmean', got " +
                      shape_of("student_logits", student) + "; use 'sum' for a single row");
      divisor = static_cast<double>(student.size(0));
      break;
    case kMean: divisor = static_cast<double>(student.numel()); break;
    case kSum:
    case kNone: break;
    default:
      fail(kKl, "reduction must be 0 (batchmean), 1 (sum), 2 (mean) or 3 (none), got " + std::to_string(reduction));
  }
  if (divisor == 0) divisor = 1;  // the mean of nothing is 0
  const double weight = temperature * temperature / divisor;
  Tensor loss = student, grad = student;
  if (reduction == kNone) {
    int64_t shape[64];
    for (int64_t i = 0; i + 1 < dims; ++i) shape[i] = student.size(i);
    loss = empty(student, shape, dims - 1, ScalarType::Float);
    c.args.row_loss = static_cast<float*>(loss.mutable_data_ptr());
  }
  c.args.row_scale = weight;
  a.kl_weight = temperature / divisor;
  if (want_grad) {
    grad = grad_like(student);
    a.grad = grad.mutable_data_ptr();
  }
  float* total = nullptr;
  if (reduction != kNone) {
    loss = number(student);
    total = float_of(loss);
  }
#if defined(FASTSPARSE_WITH_CUDA)
  if (student.is_cuda()) {
    on_cuda(student, a.rows, [&](void* scratch, void* stream) { sm80::kl_div(c.args, total, scratch, stream); });
    return {loss, grad};
  }
#endif
  const Sums sums = fs::kl_loss::loss(select(), c.args);
  if (total != nullptr) *total = static_cast<float>(sums.kl * weight);
  return {loss, grad};
}

Tensor kl_op(Tensor student, Tensor teacher, double temperature, int64_t reduction) {
  return std::get<0>(kl(student, teacher, temperature, reduction, false));
}

std::tuple<Tensor, Tensor> kl_train_op(Tensor student, Tensor teacher, double temperature, int64_t reduction) {
  return kl(student, teacher, temperature, reduction, true);
}

struct Distilled {
  Tensor loss, kl, ce, grad;
};

Distilled distill(const Tensor& student, const Tensor& teacher, const Tensor& target, double temperature, double alpha,
                  int64_t ignore_index, bool want_grad) {
  Checked c = check_logits(kDistill, student, teacher, temperature);
  RowsArgs& a = c.args.rows;
  if (!(alpha >= 0 && alpha <= 1)) fail(kDistill, "alpha must be in [0, 1], got " + text(alpha));
  check_same_device(kDistill, "target", target, student);
  check_dtype(kDistill, "target", target, ScalarType::Long);
  const int64_t dims = student.dim();
  bool same = target.dim() == dims - 1;
  for (int64_t i = 0; same && i + 1 < dims; ++i) same = target.size(i) == student.size(i);
  if (!same)
    fail(kDistill, "target must have the leading shape of " + shape_of("student_logits", student) + ", got " +
                       shape_of("target", target));
  const Tensor targets = as_contiguous(target);
  a.target = static_cast<const int64_t*>(targets.const_data_ptr());
  a.ignore_index = ignore_index;
  a.kl_weight = alpha * temperature;
  a.ce_weight = 1 - alpha;
  Tensor grad = student;
  if (want_grad) {
    grad = grad_like(student);
    a.grad = grad.mutable_data_ptr();
  }
  const Distilled d{number(student), number(student), number(student), grad};
#if defined(FASTSPARSE_WITH_CUDA)
  if (student.is_cuda()) {  // the targets in device memory are not looked at here
    on_cuda(student, a.rows, [&](void* scratch, void* stream) {
      sm80::distill_loss(a, alpha, {float_of(d.loss), float_of(d.kl), float_of(d.ce)}, scratch, stream);
    });
    return d;
  }
#endif
  int64_t valid = 0;
  for (int64_t r = 0; r < a.rows; ++r) {
    if (a.target[r] == ignore_index) continue;
    ++valid;
    if (a.target[r] < 0 || a.target[r] >= a.classes)
      fail(kDistill, "target must be in [0, " + std::to_string(a.classes) +
                         ") or ignore_index=" + std::to_string(ignore_index) + ", got " + std::to_string(a.target[r]) +
                         " at row " + std::to_string(r));
  }
  const double divisor = valid == 0 ? 1 : static_cast<double>(valid);  // the mean of nothing is 0
  a.kl_weight /= divisor;
  a.ce_weight /= divisor;
  const Sums sums = fs::kl_loss::loss(select(), c.args);
  const double kl = sums.kl * temperature * temperature / divisor, ce = sums.ce / divisor;
  *float_of(d.loss) = static_cast<float>(alpha * kl + (1 - alpha) * ce);
  *float_of(d.kl) = static_cast<float>(kl);
  *float_of(d.ce) = static_cast<float>(ce);
  return d;
}

std::tuple<Tensor, Tensor, Tensor> distill_op(Tensor student, Tensor teacher, Tensor target, double temperature,
                                              double alpha, int64_t ignore_index) {
  const Distilled d = distill(student, teacher, target, temperature, alpha, ignore_index, false);
  return {d.loss, d.kl, d.ce};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> distill_train_op(Tensor student, Tensor teacher, Tensor target,
                                                            double temperature, double alpha, int64_t ignore_index) {
  const Distilled d = distill(student, teacher, target, temperature, alpha, ignore_index, true);
  return {d.loss, d.kl, d.ce, d.grad};
}

Tensor kl_cuda(Tensor student, Tensor teacher, double temperature, int64_t reduction) {
  check_cuda_kernels(kKl);
  return kl_op(student, teacher, temperature, reduction);
}
std::tuple<Tensor, Tensor> kl_train_cuda(Tensor student, Tensor teacher, double temperature, int64_t reduction) {
  check_cuda_kernels(kKl);
  return kl_train_op(student, teacher, temperature, reduction);
}
std::tuple<Tensor, Tensor, Tensor> distill_cuda(Tensor student, Tensor teacher, Tensor target, double temperature,
                                                double alpha, int64_t ignore_index) {
  check_cuda_kernels(kDistill);
  return distill_op(student, teacher, target, temperature, alpha, ignore_index);
}
std::tuple<Tensor, Tensor, Tensor, Tensor> distill_train_cuda(Tensor student, Tensor teacher, Tensor target,
                                                              double temperature, double alpha, int64_t ignore_index) {
  check_cuda_kernels(kDistill);
  return distill_train_op(student, teacher, target, temperature, alpha, ignore_index);
}

}  // namespace
}  // namespace fs::kl_loss

STABLE_TORCH_LIBRARY_FRAGMENT(fastsparse, m) {
  m.def("kl_div(Tensor student, Tensor teacher, float temperature, int reduction) -> Tensor");
  m.def(
      "distill_loss(Tensor student, Tensor teacher, Tensor target, float temperature, float alpha, int ignore_index) "
      "-> "
      "(Tensor, Tensor, Tensor)");
  // The same with the gradient to the student as the last result; these carry autograd.
  m.def("kl_div_train(Tensor student, Tensor teacher, float temperature, int reduction) -> (Tensor, Tensor)");
  m.def(
      "distill_loss_train(Tensor student, Tensor teacher, Tensor target, float temperature, float alpha, int "
      "ignore_index) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CUDA, m) {
  m.impl("kl_div", TORCH_BOX(&fs::kl_loss::kl_cuda));
  m.impl("kl_div_train", TORCH_BOX(&fs::kl_loss::kl_train_cuda));
  m.impl("distill_loss", TORCH_BOX(&fs::kl_loss::distill_cuda));
  m.impl("distill_loss_train", TORCH_BOX(&fs::kl_loss::distill_train_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CPU, m) {
  m.impl("kl_div", TORCH_BOX(&fs::kl_loss::kl_op));
  m.impl("kl_div_train", TORCH_BOX(&fs::kl_loss::kl_train_op));
  m.impl("distill_loss", TORCH_BOX(&fs::kl_loss::distill_op));
  m.impl("distill_loss_train", TORCH_BOX(&fs::kl_loss::distill_train_op));
}
