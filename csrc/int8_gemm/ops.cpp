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
#include "formats/vnni16.h"
#include "int8_gemm.h"
#include "select.h"

namespace fs::int8_gemm {
namespace {

constexpr const char* kLinear = "int8_linear";
constexpr const char* kMm = "int8_mm";

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

// A tensor of one element on the CPU, whatever device x is on: the launcher needs its value.
const void* scalar(const char* op, const char* name, const Tensor& t, ScalarType wanted) {
  check_cpu(op, name, t);
  check_dtype(op, name, t, wanted);
  if (t.numel() != 1) fail(op, std::string(name) + " must have one element, got " + shape_of(name, t));
  return t.const_data_ptr();
}

// The arguments of int8_linear, checked, with the tensors that keep their memory alive.
struct CheckedLinear {
  LinearArgs args;
  Tensor rows, scales, bias, y;
};

CheckedLinear check_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                           const std::optional<Tensor>& bias, int64_t activation, const std::optional<Tensor>& x_scale,
                           const std::optional<Tensor>& x_zero_point) {
  const DType dtype = float_dtype(kLinear, "x", x);
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
    if (!error.empty()) fail(kLinear, "weight must be a vnni16 pack that matches x and weight_scale: " + error);
  } else if (weight.numel() != vnni16::pack_bytes(n, k)) {  // the header is in device memory; its size is not
    fail(kLinear, "weight must be a vnni16 pack of [N=" + std::to_string(n) + ", K=" + std::to_string(k) + "], " +
                      std::to_string(vnni16::pack_bytes(n, k)) + " bytes, got " + std::to_string(weight.numel()));
  }

  if (bias.has_value()) {
    check_same_device(kLinear, "bias", *bias, x);
    check_dtype(kLinear, "bias", *bias, ScalarType::Float);
    check_vector(kLinear, "bias", *bias, n);
  }
  if (activation < 0 || activation > 3)
    fail(kLinear, "activation must be 0 (none), 1 (relu), 2 (gelu) or 3 (silu), got " + std::to_string(activation));

  float scale = 1.0f;
  int32_t zero_point = 0;
  if (x_scale.has_value()) {
    scale = *static_cast<const float*>(scalar(kLinear, "x_scale", *x_scale, ScalarType::Float));
    if (!(scale >= FLT_MIN) || !std::isfinite(scale))
      fail(kLinear, "x_scale must be finite and at least 1.2e-38, got " + text(scale));
  }
  if (x_zero_point.has_value()) {
    if (!x_scale.has_value()) fail(kLinear, "x_zero_point needs x_scale: dynamic quantization is symmetric");
    zero_point = *static_cast<const int32_t*>(scalar(kLinear, "x_zero_point", *x_zero_point, ScalarType::Int));
    if (zero_point < -128 || zero_point > 127)
      fail(kLinear, "x_zero_point must be in [-128, 127], got " + std::to_string(zero_point));
  }
  const int64_t k_limit = zero_point == 0 ? kMaxK : kMaxKAffine;
  if (k > k_limit)
    fail(kLinear, "x must have at most K=" + std::to_string(k_limit) +
                      " columns for the sums to be exact in int32, got " + shape_of("x", x));

  // Rows that lie apart by a constant step are read where they are; anything else is copied.
  const bool strided_matrix = dims == 2 && x.stride(1) == 1 && x.stride(0) >= k;
  int64_t m = 1;
  int64_t shape[64];  // torch allows no more dimensions
  for (int64_t i = 0; i + 1 < dims; ++i) m *= shape[i] = x.size(i);
  shape[dims - 1] = n;
  CheckedLinear c{{},
                  strided_matrix ? x : as_contiguous(x),
                  as_contiguous(weight_scale),
                  bias.has_value() ? as_contiguous(*bias) : weight_scale,
                  empty(x, shape, dims, x.scalar_type())};
  c.args.x = c.rows.const_data_ptr();
  c.args.dtype = dtype;
  c.args.x_stride = strided_matrix ? x.stride(0) : k;
  c.args.m = m;
  c.args.n = n;
  c.args.k = k;
  c.args.weight = pack;
  c.args.weight_scale = static_cast<const float*>(c.scales.const_data_ptr());
  c.args.bias = bias.has_value() ? static_cast<const float*>(c.bias.const_data_ptr()) : nullptr;
  c.args.activation = static_cast<Activation>(activation);
  c.args.dynamic = !x_scale.has_value();
  c.args.x_scale = scale;
  c.args.x_zero_point = zero_point;
  c.args.y = c.y.mutable_data_ptr();
  if (x.is_cpu() && !all_finite(c.args.weight_scale, n))
    fail(kLinear, "weight_scale must be finite, got a NaN or an infinity in it");
  return c;
}

Tensor linear_cpu(Tensor x, Tensor weight, Tensor weight_scale, std::optional<Tensor> bias, int64_t activation,
                  std::optional<Tensor> x_scale, std::optional<Tensor> x_zero_point) {
  const CheckedLinear c = check_linear(x, weight, weight_scale, bias, activation, x_scale, x_zero_point);
  linear(select(), c.args);
  return c.y;
}

#if defined(FASTSPARSE_WITH_CUDA)
Tensor linear_cuda(Tensor x, Tensor weight, Tensor weight_scale, std::optional<Tensor> bias, int64_t activation,
                   std::optional<Tensor> x_scale, std::optional<Tensor> x_zero_point) {
  check_proven(kLinear, sm80::kName, sm80::kProven);
  const CheckedLinear c = check_linear(x, weight, weight_scale, bias, activation, x_scale, x_zero_point);
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(x.get_device_index()));
  Tensor scratch = empty(x, std::array{sm80::scratch_bytes(c.args.m, c.args.k)}.data(), 1, ScalarType::Byte);
  sm80::linear(c.args, static_cast<uint8_t*>(scratch.mutable_data_ptr()), current_cuda_stream(x));
  return c.y;
}
#else
Tensor linear_cuda(Tensor, Tensor, Tensor, std::optional<Tensor>, int64_t, std::optional<Tensor>,
                   std::optional<Tensor>) {
  throw std::runtime_error(
      "int8_linear: x is on cuda, and this build of fastsparse has no CUDA kernels (FASTSPARSE_CUDA=ON makes one)");
}
#endif

Tensor train_cpu(Tensor x, Tensor weight, Tensor weight_scale, std::optional<Tensor> bias,
                 std::optional<Tensor> x_scale, std::optional<Tensor> x_zero_point) {
  return linear_cpu(x, weight, weight_scale, bias, 0, x_scale, x_zero_point);
}

Tensor train_cuda(Tensor x, Tensor weight, Tensor weight_scale, std::optional<Tensor> bias,
                  std::optional<Tensor> x_scale, std::optional<Tensor> x_zero_point) {
  return linear_cuda(x, weight, weight_scale, bias, 0, x_scale, x_zero_point);
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
  Tensor out = empty(weight, std::array{vnni16::pack_bytes(n, k)}.data(), 1, ScalarType::Byte);
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
      "Tensor? x_scale=None, Tensor? x_zero_point=None) -> Tensor");
  // The same kernel under a name that carries autograd, without the activation, which torch differentiates itself:
  // registered on int8_linear, autograd would cost every call 4 us, gradient or not.
  m.def(
      "int8_linear_train(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, Tensor? x_scale=None, "
      "Tensor? x_zero_point=None) -> Tensor");
  m.def("int8_mm(Tensor a, Tensor b) -> Tensor");
  m.def("int8_pack(Tensor weight) -> Tensor");
  m.def("int8_unpack(Tensor pack, int n, int k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CUDA, m) {
  m.impl("int8_linear", TORCH_BOX(&fs::int8_gemm::linear_cuda));
  m.impl("int8_linear_train", TORCH_BOX(&fs::int8_gemm::train_cuda));
  m.impl("int8_mm", TORCH_BOX(&fs::int8_gemm::mm_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CPU, m) {
  m.impl("int8_linear", TORCH_BOX(&fs::int8_gemm::linear_cpu));
  m.impl("int8_linear_train", TORCH_BOX(&fs::int8_gemm::train_cpu));
  m.impl("int8_mm", TORCH_BOX(&fs::int8_gemm::mm_cpu));
  m.impl("int8_pack", TORCH_BOX(&fs::int8_gemm::pack_cpu));
  m.impl("int8_unpack", TORCH_BOX(&fs::int8_gemm::unpack_cpu));
}
