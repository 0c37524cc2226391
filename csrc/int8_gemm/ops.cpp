// int8_gemm: schemas and tensor checks. The only file of the family that knows torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cfloat>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "../runtime/checks.h"
#include "formats/vnni16.h"
#include "int8_gemm.h"
#include "select.h"

namespace fs::int8_gemm {
namespace {

constexpr const char* kLinear = "int8_linear";
constexpr const char* kMm = "int8_mm";

DType float_dtype(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: fail(op, std::string("x must be float32, bfloat16 or float16, got ") + dtype_name(x.scalar_type()));
  }
}

// All exponent bits set: an infinity or a NaN. As integers, so that the compiler makes vectors of it.
bool all_finite(const float* p, int64_t n) {
  uint32_t worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, p + i, 4);
    bits &= 0x7fffffff;
    worst = bits > worst ? bits : worst;
  }
  return worst < 0x7f800000;
}

// weight_scale f32[n] of a layer with k inputs and the pack that belongs to it, all on the CPU.
void check_weight(const char* op, const Tensor& weight, const Tensor& weight_scale, int64_t n, int64_t k) {
  check_cpu(op, "weight", weight);
  check_dtype(op, "weight", weight, ScalarType::Byte);
  if (weight.dim() != 1 || !weight.is_contiguous())
    fail(op, "weight must be a pack, a contiguous uint8 vector made by ops.pack(); got " + shape_of("weight", weight));
  const std::string error =
      vnni16::header_error(static_cast<const uint8_t*>(weight.const_data_ptr()), weight.numel(), n, k);
  if (!error.empty()) fail(op, "weight must be a vnni16 pack that matches x and weight_scale: " + error);
  check_cpu(op, "weight_scale", weight_scale);
  check_dtype(op, "weight_scale", weight_scale, ScalarType::Float);
}

// A tensor of one element, read on the CPU.
float scalar_f32(const char* op, const char* name, const Tensor& t) {
  check_cpu(op, name, t);
  check_dtype(op, name, t, ScalarType::Float);
  if (t.numel() != 1) fail(op, std::string(name) + " must have one element, got " + shape_of(name, t));
  return *static_cast<const float*>(t.const_data_ptr());
}

int32_t scalar_s32(const char* op, const char* name, const Tensor& t) {
  check_cpu(op, name, t);
  check_dtype(op, name, t, ScalarType::Int);
  if (t.numel() != 1) fail(op, std::string(name) + " must have one element, got " + shape_of(name, t));
  return *static_cast<const int32_t*>(t.const_data_ptr());
}

Tensor linear_cpu(Tensor x, Tensor weight, Tensor weight_scale, std::optional<Tensor> bias, int64_t activation,
                  std::optional<Tensor> x_scale, std::optional<Tensor> x_zero_point) {
  LinearArgs args;
  args.dtype = float_dtype(kLinear, x);
  const int64_t dims = x.dim();
  if (dims < 1) fail(kLinear, "x must have at least one dimension, got x[]");
  if (weight_scale.dim() != 1) fail(kLinear, "weight_scale must have shape [N], got " + shape_of("weight_scale", weight_scale));
  args.k = x.size(dims - 1);
  args.n = weight_scale.size(0);
  check_weight(kLinear, weight, weight_scale, args.n, args.k);
  const Tensor scales = as_contiguous(weight_scale);
  args.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  args.weight_scale = static_cast<const float*>(scales.const_data_ptr());
  if (!all_finite(args.weight_scale, args.n)) fail(kLinear, "weight_scale must be finite, got a NaN or an infinity in it");

  std::optional<Tensor> bias_row;
  args.bias = nullptr;
  if (bias.has_value()) {
    check_cpu(kLinear, "bias", *bias);
    check_dtype(kLinear, "bias", *bias, ScalarType::Float);
    check_vector(kLinear, "bias", *bias, args.n);
    bias_row = as_contiguous(*bias);
    args.bias = static_cast<const float*>(bias_row->const_data_ptr());
  }
  if (activation < 0 || activation > 3)
    fail(kLinear, "activation must be 0 (none), 1 (relu), 2 (gelu) or 3 (silu), got " + std::to_string(activation));
  args.activation = static_cast<Activation>(activation);

  args.dynamic = !x_scale.has_value();
  args.x_scale = 1.0f;
  args.x_zero_point = 0;
  if (x_scale.has_value()) {
    args.x_scale = scalar_f32(kLinear, "x_scale", *x_scale);
    if (!(args.x_scale >= FLT_MIN) || !std::isfinite(args.x_scale))
      fail(kLinear, "x_scale must be finite and at least 1.2e-38, got " + std::to_string(args.x_scale));
  }
  if (x_zero_point.has_value()) {
    if (args.dynamic) fail(kLinear, "x_zero_point needs x_scale: dynamic quantization is symmetric");
    args.x_zero_point = scalar_s32(kLinear, "x_zero_point", *x_zero_point);
    if (args.x_zero_point < -128 || args.x_zero_point > 127)
      fail(kLinear, "x_zero_point must be in [-128, 127], got " + std::to_string(args.x_zero_point));
  }
  const int64_t k_limit = args.x_zero_point == 0 ? kMaxK : kMaxKAffine;
  if (args.k > k_limit)
    fail(kLinear, "x must have at most K=" + std::to_string(k_limit) +
                      " columns for the sums to be exact in int32, got " + shape_of("x", x));

  // Rows that lie apart by a constant step are read where they are; anything else is copied.
  const bool strided_matrix = dims == 2 && x.stride(1) == 1 && x.stride(0) >= args.k;
  const Tensor rows = strided_matrix ? x : as_contiguous(x);
  args.x = rows.const_data_ptr();
  args.x_stride = strided_matrix ? x.stride(0) : args.k;
  args.m = 1;
  std::vector<int64_t> shape(static_cast<size_t>(dims));
  for (int64_t i = 0; i + 1 < dims; ++i) args.m *= shape[static_cast<size_t>(i)] = x.size(i);
  shape.back() = args.n;
  Tensor y = torch::stable::new_empty(x, shape);
  args.y = y.mutable_data_ptr();
  linear(select(), args);
  return y;
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
    fail(kMm, "b must have K=" + std::to_string(args.k) + " rows to match " + shape_of("a", a) + ", got " + shape_of("b", b));
  if (args.k > kMaxK)
    fail(kMm, "K must be at most " + std::to_string(kMaxK) + " for the sums to be exact in int32, got " + shape_of("a", a));
  const bool strided = a.stride(1) == 1 && a.stride(0) >= args.k;
  const Tensor rows = strided ? a : as_contiguous(a);
  args.a = static_cast<const int8_t*>(rows.const_data_ptr());
  args.a_stride = strided ? a.stride(0) : args.k;
  args.b = static_cast<const int8_t*>(b.const_data_ptr());
  args.b_stride_k = b.stride(0);
  args.b_stride_n = b.stride(1);
  Tensor c = torch::stable::new_empty(a, {args.m, args.n}, ScalarType::Int);
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
  Tensor out = torch::stable::new_empty(weight, {vnni16::pack_bytes(n, k)}, ScalarType::Byte);
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
  Tensor out = torch::stable::new_empty(pack, {n, k}, ScalarType::Char);
  vnni16::unpack(data, n, k, static_cast<int8_t*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace fs::int8_gemm

STABLE_TORCH_LIBRARY_FRAGMENT(fastsparse, m) {
  m.def(
      "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, int activation=0, "
      "Tensor? x_scale=None, Tensor? x_zero_point=None) -> Tensor");
  // The same kernel under a name that carries autograd: registered on int8_linear itself, autograd would cost every
  // call 4 us, gradient or not.
  m.def(
      "int8_linear_train(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, int activation=0, "
      "Tensor? x_scale=None, Tensor? x_zero_point=None) -> Tensor");
  m.def("int8_mm(Tensor a, Tensor b) -> Tensor");
  m.def("int8_pack(Tensor weight) -> Tensor");
  m.def("int8_unpack(Tensor pack, int n, int k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CPU, m) {
  m.impl("int8_linear", TORCH_BOX(&fs::int8_gemm::linear_cpu));
  m.impl("int8_linear_train", TORCH_BOX(&fs::int8_gemm::linear_cpu));
  m.impl("int8_mm", TORCH_BOX(&fs::int8_gemm::mm_cpu));
  m.impl("int8_pack", TORCH_BOX(&fs::int8_gemm::pack_cpu));
  m.impl("int8_unpack", TORCH_BOX(&fs::int8_gemm::unpack_cpu));
}
