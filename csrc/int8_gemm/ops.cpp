// int8_gemm: schemas and tensor checks. The only file of the family that knows torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <optional>

#include "../runtime/checks.h"
#if defined(FASTSPARSE_WITH_CUDA)
#include "../runtime/cuda/torch_stream.h"
#include "cuda/sm80.h"
#endif
#include "../runtime/finite.h"
#include "formats/vnni16.h"
#include "int8_gemm.h"
#include "select.h"

namespace fs::int8_gemm {
namespace {

constexpr const char* kLinear = "int8_linear";
constexpr const char* kMm = "int8_mm";

// A tensor of one element on the CPU, whatever device x is on: the launcher needs its value.
const void* scalar(const char* op, const char* name, const Tensor& t, ScalarType wanted) {
  check_cpu(op, name, t);
  check_dtype(op, name, t, wanted);
  if (t.numel() != 1) fail(op, std::string(name) + " must have one element, got " + shape_of(name, t));
  return t.const_data_ptr();
}

using MaybeTensor = std::optional<Tensor>;

// A scale of one element on the CPU; 1 where there is none.
float scale_value(const char* name, const MaybeTensor& t) {
  if (!t.has_value()) return 1.0f;
  const float value = *static_cast<const float*>(scalar(kLinear, name, *t, ScalarType::Float));
  if (!(value >= FLT_MIN) || !std::isfinite(value))
    fail(kLinear, std::string(name) + " must be finite and at least 1.2e-38, got " + text(value));
  return value;
}

// A zero point of one element on the CPU; 0 where there is none.
int32_t zero_point_value(const char* name, const MaybeTensor& t) {
  if (!t.has_value()) return 0;
  const int32_t value = *static_cast<const int32_t*>(scalar(kLinear, name, *t, ScalarType::Int));
  if (value < -128 || value > 127)
    fail(kLinear, std::string(name) + " must be in [-128, 127], got " + std::to_string(value));
  return value;
}

// The memory of a tensor as a contiguous one; `copy` keeps it alive where there must be one.
const void* contiguous_data(const Tensor& t, MaybeTensor* copy) {
  if (t.is_contiguous()) return t.const_data_ptr();
  *copy = torch::stable::contiguous(t);
  return (*copy)->const_data_ptr();
}

// Rows that lie apart by a constant step are read where they are; anything else is copied.
struct Rows {
  const void* data;
  int64_t stride;
};
Rows as_rows(const Tensor& t, int64_t columns, MaybeTensor* copy) {
  if (t.dim() == 2 && t.stride(1) == 1 && t.stride(0) >= columns) return {t.const_data_ptr(), t.stride(0)};
  return {contiguous_data(t, copy), columns};
}

// int8 x alone: a scale for each row, [..., 1] where x is; a single one counts as such only where x is on a device.
bool is_scale_per_row(const Tensor& x, const Tensor& scale) {
  const int64_t dims = x.dim();
  if (scale.dim() != dims || scale.size(dims - 1) != 1 || (scale.numel() == 1 && x.is_cpu())) return false;
  if (scale.is_cpu() != x.is_cpu()) return false;
  for (int64_t i = 0; i + 1 < dims; ++i)
    if (scale.size(i) != x.size(i)) return false;
  return true;
}

// What int8_linear is called with: the schema's order.
struct LinearInputs {
  const Tensor &x, &weight, &weight_scale;
  const MaybeTensor& bias;
  int64_t activation;
  const MaybeTensor &x_scale, &x_zero_point, &residual, &y_scale, &y_zero_point;
  const std::optional<int64_t>& dtype;
};

// The arguments of int8_linear, checked, with what was copied of them. They point into the caller's tensors.
struct CheckedLinear {
  LinearArgs args;
  Tensor y;
  MaybeTensor x, weight_scale, bias, x_scales, residual;
};

// The float type of y and of the residual: float32 for int8 x, that of x else, unless `dtype` says so.
ScalarType float_type_of_y(const LinearInputs& in, bool x_codes) {
  if (!in.dtype.has_value()) return x_codes ? ScalarType::Float : in.x.scalar_type();
  switch (*in.dtype) {
    case 0: return ScalarType::Float;
    case 1: return ScalarType::BFloat16;
    case 2: return ScalarType::Half;
    default: fail(kLinear, "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got " + std::to_string(*in.dtype));
  }
}

CheckedLinear check_linear(const LinearInputs& in) {
  const Tensor &x = in.x, &weight = in.weight, &weight_scale = in.weight_scale;
  check_given(kLinear, "x", x);
  check_given(kLinear, "weight", weight);
  check_given(kLinear, "weight_scale", weight_scale);
  const bool x_codes = x.scalar_type() == ScalarType::Char;
  if (!x_codes && x.scalar_type() != ScalarType::Float && x.scalar_type() != ScalarType::BFloat16 &&
      x.scalar_type() != ScalarType::Half)
    fail(kLinear, std::string("x must be float32, bfloat16, float16 or int8, got ") + dtype_name(x.scalar_type()));
  const ScalarType y_type = float_type_of_y(in, x_codes);
  const int64_t dims = x.dim();
  if (dims < 1) fail(kLinear, "x must have at least one dimension, got x[]");
  check_same_device(kLinear, "weight_scale", weight_scale, x);
  check_dtype(kLinear, "weight_scale", weight_scale, ScalarType::Float);
  if (weight_scale.dim() != 1)
    fail(kLinear, "weight_scale must have shape [N], got " + shape_of("weight_scale", weight_scale));
  const int64_t k = x.size(dims - 1), n = weight_scale.size(0);

  check_same_device(kLinear, "weight", weight, x);
  check_dtype(kLinear, "weight", weight, ScalarType::Byte);
  if (weight.dim() != 1 || !weight.is_contiguous())
    fail(kLinear,
         "weight must be a pack, a contiguous uint8 vector made by ops.pack(), got " + shape_of("weight", weight));
  const auto* pack = static_cast<const uint8_t*>(weight.const_data_ptr());
  if (x.is_cpu()) {
    const std::string error = vnni16::header_error(pack, weight.numel(), n, k);
    if (!error.empty()) {
      const int64_t packed = vnni16::packed_k(pack, weight.numel(), n);
      if (packed >= 0)
        fail(kLinear, "x must have K=" + std::to_string(packed) + " columns to match the packed weight, got " +
                          shape_of("x", x));
      fail(kLinear, "weight must be a vnni16 pack that matches x and weight_scale: " + error);
    }
  } else if (weight.numel() != vnni16::pack_bytes(n, k)) {  // the header is in device memory; its size is not
    fail(kLinear, "weight must be a vnni16 pack of [N=" + std::to_string(n) + ", K=" + std::to_string(k) + "], " +
                      std::to_string(vnni16::pack_bytes(n, k)) + " bytes, got " + std::to_string(weight.numel()));
  }

  if (in.bias.has_value()) {
    check_same_device(kLinear, "bias", *in.bias, x);
    check_dtype(kLinear, "bias", *in.bias, ScalarType::Float);
    check_vector(kLinear, "bias", *in.bias, n);
  }
  if (in.activation < 0 || in.activation > 3)
    fail(kLinear, "activation must be 0 (none), 1 (relu), 2 (gelu) or 3 (silu), got " + std::to_string(in.activation));

  if (x_codes && !in.x_scale.has_value()) fail(kLinear, "x_scale must be given with an int8 x, got none");
  const bool per_row = x_codes && is_scale_per_row(x, *in.x_scale);
  if (per_row) {
    check_same_device(kLinear, "x_scale", *in.x_scale, x);
    check_dtype(kLinear, "x_scale", *in.x_scale, ScalarType::Float);
  } else if (x_codes && in.x_scale->numel() != 1) {
    fail(kLinear, "x_scale must have one element, or one for each row of an int8 " + shape_of("x", x) + ", got " +
                      shape_of("x_scale", *in.x_scale));
  }
  const float scale = per_row ? 1.0f : scale_value("x_scale", in.x_scale);
  if (in.x_zero_point.has_value() && !in.x_scale.has_value())
    fail(kLinear, "x_zero_point needs x_scale: dynamic quantization is symmetric");
  const int32_t zero_point = zero_point_value("x_zero_point", in.x_zero_point);
  const int64_t k_limit = zero_point == 0 ? kMaxK : kMaxKAffine;
  if (k > k_limit)
    fail(kLinear, "x must have at most K=" + std::to_string(k_limit) +
                      " columns for the sums to be exact in int32, got " + shape_of("x", x));

  int64_t m = 1;
  int64_t shape[64];  // torch allows no more dimensions
  for (int64_t i = 0; i + 1 < dims; ++i) m *= shape[i] = x.size(i);
  shape[dims - 1] = n;
  if (in.residual.has_value()) {
    const Tensor& residual = *in.residual;
    check_same_device(kLinear, "residual", residual, x);
    check_dtype(kLinear, "residual", residual, y_type);
    bool same = residual.dim() == dims;
    for (int64_t i = 0; same && i < dims; ++i) same = residual.size(i) == shape[i];
    if (!same)
      fail(kLinear, "residual must have y's shape, N=" + std::to_string(n) + " columns for the rows of " +
                        shape_of("x", x) + ", got " + shape_of("residual", residual));
  }
  const float y_scale = scale_value("y_scale", in.y_scale);
  if (in.y_zero_point.has_value() && !in.y_scale.has_value())
    fail(kLinear, "y_zero_point needs y_scale: without it y is a float");
  const int32_t y_zero_point = zero_point_value("y_zero_point", in.y_zero_point);

  const bool requantize = in.y_scale.has_value();
  CheckedLinear c{{}, empty(x, shape, dims, requantize ? ScalarType::Char : y_type), {}, {}, {}, {}, {}};
  const Rows rows = as_rows(x, k, &c.x);
  LinearArgs& a = c.args;
  a.x = rows.data;
  a.x_codes = x_codes;
  if (!x_codes) a.dtype = float_dtype(kLinear, "x", x);
  a.x_stride = rows.stride;
  a.m = m;
  a.n = n;
  a.k = k;
  a.weight = pack;
  a.weight_scale = static_cast<const float*>(contiguous_data(weight_scale, &c.weight_scale));
  a.bias = in.bias.has_value() ? static_cast<const float*>(contiguous_data(*in.bias, &c.bias)) : nullptr;
  a.activation = static_cast<Activation>(in.activation);
  a.dynamic = !in.x_scale.has_value();
  a.x_scale = scale;
  a.x_zero_point = zero_point;
  a.x_scales = per_row ? static_cast<const float*>(contiguous_data(*in.x_scale, &c.x_scales)) : nullptr;
  if (in.residual.has_value()) {
    const Rows residual = as_rows(*in.residual, n, &c.residual);
    a.residual = residual.data;
    a.residual_stride = residual.stride;
  }
  a.y_dtype = y_type == ScalarType::Float ? DType::f32 : y_type == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
  a.requantize = requantize;
  a.y_scale = y_scale;
  a.y_zero_point = y_zero_point;
  a.y = c.y.mutable_data_ptr();
  if (x.is_cpu() && !all_finite(a.weight_scale, n))
    fail(kLinear, "weight_scale must be finite, got a NaN or an infinity in it");
  return c;
}

Tensor linear_cpu(Tensor x, Tensor weight, Tensor weight_scale, MaybeTensor bias, int64_t activation,
                  MaybeTensor x_scale, MaybeTensor x_zero_point, MaybeTensor residual, MaybeTensor y_scale,
                  MaybeTensor y_zero_point, std::optional<int64_t> dtype) {
  const CheckedLinear c = check_linear(
      {x, weight, weight_scale, bias, activation, x_scale, x_zero_point, residual, y_scale, y_zero_point, dtype});
  linear(select(), c.args);
  return c.y;
}

#if defined(FASTSPARSE_WITH_CUDA)
Tensor linear_cuda(Tensor x, Tensor weight, Tensor weight_scale, MaybeTensor bias, int64_t activation,
                   MaybeTensor x_scale, MaybeTensor x_zero_point, MaybeTensor residual, MaybeTensor y_scale,
                   MaybeTensor y_zero_point, std::optional<int64_t> dtype) {
  check_proven(kLinear, sm80::kName, sm80::kProven);
  const CheckedLinear c = check_linear(
      {x, weight, weight_scale, bias, activation, x_scale, x_zero_point, residual, y_scale, y_zero_point, dtype});
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(x.get_device_index()));
  Tensor scratch = empty(x, std::array{sm80::scratch_bytes(c.args.m, c.args.k)}.data(), 1, ScalarType::Byte);
  sm80::linear(c.args, static_cast<uint8_t*>(scratch.mutable_data_ptr()), current_cuda_stream(x));
  return c.y;
}
#else
Tensor linear_cuda(Tensor, Tensor, Tensor, MaybeTensor, int64_t, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor,
                   MaybeTensor, std::optional<int64_t>) {
  throw std::runtime_error(
      "int8_linear: x is on cuda, and this build of fastsparse has no CUDA kernels (FASTSPARSE_CUDA=ON makes one)");
}
#endif

Tensor plain_cpu(Tensor x, Tensor weight, Tensor weight_scale, MaybeTensor bias, int64_t activation) {
  const MaybeTensor none;
  CheckedLinear c =
      check_linear({x, weight, weight_scale, bias, activation, none, none, none, none, none, std::nullopt});
  linear(select(), c.args);
  return std::move(c.y);
}

Tensor plain_cuda(Tensor x, Tensor weight, Tensor weight_scale, MaybeTensor bias, int64_t activation) {
  return linear_cuda(x, weight, weight_scale, bias, activation, {}, {}, {}, {}, {}, {});
}

Tensor train_cpu(Tensor x, Tensor weight, Tensor weight_scale, MaybeTensor bias, MaybeTensor x_scale,
                 MaybeTensor x_zero_point, MaybeTensor residual, std::optional<int64_t> dtype) {
  return linear_cpu(x, weight, weight_scale, bias, 0, x_scale, x_zero_point, residual, {}, {}, dtype);
}

Tensor train_cuda(Tensor x, Tensor weight, Tensor weight_scale, MaybeTensor bias, MaybeTensor x_scale,
                  MaybeTensor x_zero_point, MaybeTensor residual, std::optional<int64_t> dtype) {
  return linear_cuda(x, weight, weight_scale, bias, 0, x_scale, x_zero_point, residual, {}, {}, dtype);
}

Tensor mm_cuda(Tensor, Tensor) {
  throw std::runtime_error(
      "int8_mm: a is on cuda, and there is no CUDA kernel for int8_mm yet; use torch._int_mm there");
}

Tensor mm_cpu(Tensor a, Tensor b) {
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"a", a}, {"b", b}}) {
    check_cpu(kMm, name, t);
    check_dtype(kMm, name, t, ScalarType::Char);
    if (t.dim() != 2) fail(kMm, std::string(name) + " must be a matrix, got " + shape_of(name, t));
  }
  MatmulArgs args;
  args.m = a.size(0);
  args.k = a.size(1);
  args.n = b.size(1);
  if (b.size(0) != args.k)
    fail(kMm, "b must have K=" + std::to_string(args.k) + " rows to match " + shape_of("a", a) + ", got " +
                  shape_of("b", b));
  if (args.k > kMaxK)
    fail(kMm,
         "K must be at most " + std::to_string(kMaxK) + " for the sums to be exact in int32, got " + shape_of("a", a));
  const bool strided = a.stride(1) == 1 && a.stride(0) >= args.k;
  const Tensor rows = strided ? a : as_contiguous(a);
  args.a = static_cast<const int8_t*>(rows.const_data_ptr());
  args.a_stride = strided ? a.stride(0) : args.k;
  args.b = static_cast<const int8_t*>(b.const_data_ptr());
  args.b_stride_k = b.stride(0);
  args.b_stride_n = b.stride(1);
  Tensor c = empty(a, std::array{args.m, args.n}.data(), 2, ScalarType::Int);
  args.c = static_cast<int32_t*>(c.mutable_data_ptr());
  matmul(select(), args);
  return c;
}

Tensor pack_cpu(Tensor weight) {
  check_cpu("int8_pack", "weight", weight);
  check_dtype("int8_pack", "weight", weight, ScalarType::Char);
  if (weight.dim() != 2) fail("int8_pack", "weight must be a matrix [N, K], got " + shape_of("weight", weight));
  const int64_t n = weight.size(0), k = weight.size(1);
  if (k > kMaxK)
    fail("int8_pack", "K must be at most " + std::to_string(kMaxK) + " for the sums to be exact in int32, got " +
                          shape_of("weight", weight));
  Tensor out = empty_pack(weight, vnni16::pack_bytes(n, k));
  vnni16::pack(static_cast<const int8_t*>(weight.const_data_ptr()), weight.stride(0), weight.stride(1), n, k,
               static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor unpack_cpu(Tensor pack, int64_t n, int64_t k) {
  check_cpu("int8_unpack", "pack", pack);
  check_dtype("int8_unpack", "pack", pack, ScalarType::Byte);
  const Tensor bytes = as_contiguous(pack);
  const auto* data = static_cast<const uint8_t*>(bytes.const_data_ptr());
  const std::string error = vnni16::header_error(data, bytes.numel(), n, k);
  if (!error.empty()) fail("int8_unpack", "pack must be a vnni16 pack: " + error);
  Tensor out = empty(pack, std::array{n, k}.data(), 2, ScalarType::Char);
  vnni16::unpack(data, n, k, static_cast<int8_t*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace fs::int8_gemm

STABLE_TORCH_LIBRARY_FRAGMENT(fastsparse, m) {
  m.def(
      "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, int activation=0, "
      "Tensor? x_scale=None, Tensor? x_zero_point=None, Tensor? residual=None, Tensor? y_scale=None, "
      "Tensor? y_zero_point=None, int? dtype=None) -> Tensor");
  // The same kernel under a name that carries autograd, without the activation, which torch differentiates itself, and
  // with a float y:
  // registered on int8_linear, autograd would cost every call 4 us, gradient or not.
  m.def(
      "int8_linear_train(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, Tensor? x_scale=None, "
      "Tensor? x_zero_point=None, Tensor? residual=None, int? dtype=None) -> Tensor");
  // Once more, without what most calls leave out: the dispatcher boxes an argument whether it was given or not, and the
  // six cost a small layer a tenth of its time.
  m.def(
      "int8_linear_plain(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, int activation=0) -> Tensor");
  m.def("int8_mm(Tensor a, Tensor b) -> Tensor");
  m.def("int8_pack(Tensor weight) -> Tensor");
  m.def("int8_unpack(Tensor pack, int n, int k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CUDA, m) {
  m.impl("int8_linear", TORCH_BOX(&fs::int8_gemm::linear_cuda));
  m.impl("int8_linear_train", TORCH_BOX(&fs::int8_gemm::train_cuda));
  m.impl("int8_linear_plain", TORCH_BOX(&fs::int8_gemm::plain_cuda));
  m.impl("int8_mm", TORCH_BOX(&fs::int8_gemm::mm_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CPU, m) {
  m.impl("int8_linear", TORCH_BOX(&fs::int8_gemm::linear_cpu));
  m.impl("int8_linear_train", TORCH_BOX(&fs::int8_gemm::train_cpu));
  m.impl("int8_linear_plain", TORCH_BOX(&fs::int8_gemm::plain_cpu));
  m.impl("int8_mm", TORCH_BOX(&fs::int8_gemm::mm_cpu));
  m.impl("int8_pack", TORCH_BOX(&fs::int8_gemm::pack_cpu));
  m.impl("int8_unpack", TORCH_BOX(&fs::int8_gemm::unpack_cpu));
}
