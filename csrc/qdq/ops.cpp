// qdq: schemas and tensor checks. The only file of the family that knows torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <optional>
#include <tuple>

#include "../runtime/checks.h"
#if defined(FASTSPARSE_WITH_CUDA)
#include "../runtime/cuda/torch_stream.h"
#include "cuda/sm80.h"
#endif
#include "qdq.h"
#include "select.h"

namespace fs::qdq {
namespace {

constexpr const char* kQuantize = "quantize";
constexpr const char* kToken = "quantize_per_token";
constexpr const char* kDequantize = "dequantize";
constexpr const char* kFake = "fake_quantize";
constexpr const char* kFakeGrad = "fake_quantize_backward";

using MaybeTensor = std::optional<Tensor>;
using Axis = std::optional<int64_t>;

// Each op has one implementation for both devices, which parts at the launch; the entry for CUDA passes this gate
// first. With one argument on CUDA the dispatcher comes there, whichever it is: the checks then say which is not where
// x is.
#if defined(FASTSPARSE_WITH_CUDA)
void check_cuda_kernels(const char* op) { check_proven(op, sm80::kName, sm80::kProven); }

// Calls body(stream) for the device of x.
template <class Body>
void on_cuda(const Tensor& x, const Body& body) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(x.get_device_index()));
  body(current_cuda_stream(x));
}
#else
void check_cuda_kernels(const char* op) {
  throw std::runtime_error(std::string(op) +
                           ": an argument is on cuda, and this build of fastsparse has no CUDA kernels "
                           "(FASTSPARSE_CUDA=ON makes them)");
}
#endif

void check_device(const char* op, const char* name, const Tensor& x) {
  if (!x.is_cuda()) check_cpu(op, name, x);
}

// An uninitialised contiguous tensor of x's shape.
Tensor empty_like(const Tensor& x, ScalarType dtype) {
  int64_t sizes[64];  // torch allows no more dimensions
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  return empty(x, sizes, x.dim(), dtype);
}

bool same_shape(const Tensor& a, const Tensor& b, int64_t dims) {
  for (int64_t i = 0; i < dims; ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

// x as [outer, channels, inner] by what scale is: one number, [channels] along an axis, or one a row (x's shape with a
// 1).
Channels channels_of(const char* op, const char* name, const Tensor& x, const Tensor& scale, Axis axis) {
  const int64_t dims = x.dim();
  if (axis.has_value()) {
    const int64_t a = *axis < 0 ? *axis + dims : *axis;
    if (a < 0 || a >= dims)
      fail(op, "axis must be a dimension of " + shape_of(name, x) + ", got " + std::to_string(*axis));
    if (scale.dim() != 1 || scale.size(0) != x.size(a))
      fail(op, "scale must have shape [" + std::to_string(x.size(a)) + "] for axis " + std::to_string(*axis) + " of " +
                   shape_of(name, x) + ", got " + shape_of("scale", scale));
    Channels c{1, x.size(a), 1};
    for (int64_t i = 0; i < a; ++i) c.outer *= x.size(i);
    for (int64_t i = a + 1; i < dims; ++i) c.inner *= x.size(i);
    return c;
  }
  if (scale.numel() == 1) return {1, 1, x.numel()};
  if (dims < 1 || scale.dim() != dims || scale.size(dims - 1) != 1 || !same_shape(x, scale, dims - 1))
    fail(op, "scale must have one element, or one per row of " + shape_of(name, x) +
                 " (its shape with 1 at the end), or one per channel and an axis, got " + shape_of("scale", scale));
  return {1, scale.numel(), x.size(dims - 1)};
}

// Checked parameters, with the tensors that keep their memory alive.
struct Checked {
  Parameters p;
  Tensor scale;
  MaybeTensor zero_point;
};

Checked check_parameters(const char* op, const char* name, const Tensor& x, const Tensor& scale,
                         const MaybeTensor& zero_point, Axis axis, int32_t lowest, int32_t highest, bool divides) {
  check_same_device(op, "scale", scale, x);
  check_dtype(op, "scale", scale, ScalarType::Float);
  Checked c{{channels_of(op, name, x, scale, axis), nullptr, nullptr}, as_contiguous(scale), std::nullopt};
  c.p.scale = static_cast<const float*>(c.scale.const_data_ptr());
  const int64_t n = c.p.shape.channels;
  const bool readable = x.is_cpu();  // the values in device memory are not looked at
  for (int64_t i = 0; divides && readable && i < n; ++i)
    if (!(c.p.scale[i] >= FLT_MIN) || !std::isfinite(c.p.scale[i])) {
      char value[32];
      std::snprintf(value, sizeof value, "%g", static_cast<double>(c.p.scale[i]));
      fail(op, std::string("scale must be finite and at least 1.2e-38, got ") + value + " at " + std::to_string(i));
    }
  if (!zero_point.has_value()) return c;
  check_same_device(op, "zero_point", *zero_point, x);
  check_dtype(op, "zero_point", *zero_point, ScalarType::Int);
  if (zero_point->dim() != scale.dim() || !same_shape(scale, *zero_point, scale.dim()))
    fail(op, "zero_point must have the shape of " + shape_of("scale", scale) + ", got " +
                 shape_of("zero_point", *zero_point));
  c.zero_point = as_contiguous(*zero_point);
  c.p.zero_point = static_cast<const int32_t*>(c.zero_point->const_data_ptr());
  for (int64_t i = 0; readable && i < n; ++i)
    if (c.p.zero_point[i] < lowest || c.p.zero_point[i] > highest)
      fail(op, "zero_point must be in [" + std::to_string(lowest) + ", " + std::to_string(highest) + "], got " +
                   std::to_string(c.p.zero_point[i]) + " at " + std::to_string(i));
  return c;
}

Tensor quantize_op(Tensor x, Tensor scale, MaybeTensor zero_point, Axis axis) {
  check_device(kQuantize, "x", x);
  const DType dtype = float_dtype(kQuantize, "x", x);
  const Checked c = check_parameters(kQuantize, "x", x, scale, zero_point, axis, -128, 127, true);
  const Tensor in = as_contiguous(x);
  Tensor codes = empty_like(x, ScalarType::Char);
  auto* out = static_cast<int8_t*>(codes.mutable_data_ptr());
#if defined(FASTSPARSE_WITH_CUDA)
  if (x.is_cuda()) {
    on_cuda(x, [&](void* stream) { sm80::quantize(in.const_data_ptr(), dtype, c.p, out, stream); });
    return codes;
  }
#endif
  quantize(select(), in.const_data_ptr(), dtype, c.p, out);
  return codes;
}

// Rows that lie apart by a constant step are read where they are; anything else is copied.
void quantize_rows(const Tensor& x, DType dtype, const Tensor& codes, const Tensor& scale) {
  const int64_t dims = x.dim(), k = x.size(dims - 1);
  const bool strided_matrix = dims == 2 && x.stride(1) == 1 && x.stride(0) >= k;
  const Tensor in = strided_matrix ? x : as_contiguous(x);
  TokenArgs a{};
  a.x = in.const_data_ptr();
  a.dtype = dtype;
  a.x_stride = strided_matrix ? x.stride(0) : k;
  a.rows = scale.numel();
  a.k = k;
  a.codes = static_cast<int8_t*>(codes.mutable_data_ptr());
  a.scale = static_cast<float*>(scale.mutable_data_ptr());
#if defined(FASTSPARSE_WITH_CUDA)
  if (x.is_cuda()) return on_cuda(x, [&](void* stream) { sm80::quantize_per_token(a, stream); });
#endif
  quantize_per_token(select(), a);
}

DType check_token(const Tensor& x) {
  check_device(kToken, "x", x);
  const DType dtype = float_dtype(kToken, "x", x);
  if (x.dim() < 1) fail(kToken, "x must have at least one dimension, got x[]");
  return dtype;
}

std::tuple<Tensor, Tensor> token_op(Tensor x) {
  const DType dtype = check_token(x);
  const int64_t dims = x.dim();
  int64_t sizes[64];
  for (int64_t i = 0; i < dims; ++i) sizes[i] = x.size(i);
  Tensor codes = empty(x, sizes, dims, ScalarType::Char);
  sizes[dims - 1] = 1;
  Tensor scale = empty(x, sizes, dims, ScalarType::Float);
  quantize_rows(x, dtype, codes, scale);
  return {codes, scale};
}

void token_out_op(Tensor x, Tensor codes, Tensor scale) {
  const DType dtype = check_token(x);
  const int64_t dims = x.dim();
  check_same_device(kToken, "codes", codes, x);
  check_dtype(kToken, "codes", codes, ScalarType::Char);
  if (codes.dim() != dims || !same_shape(x, codes, dims) || !codes.is_contiguous())
    fail(kToken,
         "codes must be contiguous and of the shape of " + shape_of("x", x) + ", got " + shape_of("codes", codes));
  check_same_device(kToken, "scale", scale, x);
  check_dtype(kToken, "scale", scale, ScalarType::Float);
  if (scale.dim() != dims || scale.size(dims - 1) != 1 || !same_shape(x, scale, dims - 1) || !scale.is_contiguous())
    fail(kToken, "scale must be contiguous and of the shape of " + shape_of("x", x) + " with 1 at the end, got " +
                     shape_of("scale", scale));
  quantize_rows(x, dtype, codes, scale);
}

Tensor dequantize_op(Tensor codes, Tensor scale, MaybeTensor zero_point, Axis axis, int64_t dtype) {
  check_device(kDequantize, "codes", codes);
  check_dtype(kDequantize, "codes", codes, ScalarType::Char);
  if (dtype < 0 || dtype > 2)
    fail(kDequantize, "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got " + std::to_string(dtype));
  // Any scale is right here: a row that could not be quantized has scale NaN, and gives NaN.
  const Checked c = check_parameters(kDequantize, "codes", codes, scale, zero_point, axis, -128, 127, false);
  const Tensor in = as_contiguous(codes);
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  Tensor y = empty_like(codes, kTypes[dtype]);
  const auto* q = static_cast<const int8_t*>(in.const_data_ptr());
#if defined(FASTSPARSE_WITH_CUDA)
  if (codes.is_cuda()) {
    on_cuda(codes,
            [&](void* stream) { sm80::dequantize(q, c.p, y.mutable_data_ptr(), static_cast<DType>(dtype), stream); });
    return y;
  }
#endif
  dequantize(select(), q, c.p, y.mutable_data_ptr(), static_cast<DType>(dtype));
  return y;
}

// y, and with_mask: the mask as u8 [rows, bytes] (qdq.h).
std::tuple<Tensor, MaybeTensor> fake(const Tensor& x, const Tensor& scale, const MaybeTensor& zero_point, int64_t bits,
                                     Axis axis, bool with_mask) {
  check_device(kFake, "x", x);
  const DType dtype = float_dtype(kFake, "x", x);
  if (bits < 2 || bits > 8) fail(kFake, "bits must be in [2, 8], got " + std::to_string(bits));
  const int32_t highest = (1 << (bits - 1)) - 1, lowest = -highest - 1;
  const Checked c = check_parameters(kFake, "x", x, scale, zero_point, axis, lowest, highest, true);
  const Tensor in = as_contiguous(x);
  Tensor y = empty_like(x, x.scalar_type());
  MaybeTensor mask;
  if (with_mask) {
    const Rows rows = rows_of(c.p.shape);
    const int64_t sizes[] = {rows.rows, mask_bytes(rows.length)};
    mask = empty(x, sizes, 2, ScalarType::Byte);
  }
  auto* bits_out = mask ? static_cast<uint8_t*>(mask->mutable_data_ptr()) : nullptr;
#if defined(FASTSPARSE_WITH_CUDA)
  if (x.is_cuda()) {
    on_cuda(x, [&](void* stream) {
      sm80::fake_quantize(in.const_data_ptr(), dtype, c.p, lowest, highest, y.mutable_data_ptr(), bits_out, stream);
    });
    return {y, mask};
  }
#endif
  fake_quantize(select(), in.const_data_ptr(), dtype, c.p, lowest, highest, y.mutable_data_ptr(), bits_out);
  return {y, mask};
}

Tensor fake_op(Tensor x, Tensor scale, MaybeTensor zero_point, int64_t bits, Axis axis) {
  return std::get<0>(fake(x, scale, zero_point, bits, axis, false));
}

std::tuple<Tensor, Tensor> fake_train_op(Tensor x, Tensor scale, MaybeTensor zero_point, int64_t bits, Axis axis) {
  const auto [y, mask] = fake(x, scale, zero_point, bits, axis, true);
  return {y, *mask};
}

Tensor fake_backward_op(Tensor grad, Tensor mask) {
  check_device(kFakeGrad, "grad", grad);
  const DType dtype = float_dtype(kFakeGrad, "grad", grad);
  check_same_device(kFakeGrad, "mask", mask, grad);
  check_dtype(kFakeGrad, "mask", mask, ScalarType::Byte);
  const int64_t n = grad.numel();
  const int64_t rows = mask.dim() == 2 ? mask.size(0) : 0;
  if (mask.dim() != 2 || (n > 0 && (rows == 0 || n % rows != 0 || mask.size(1) != mask_bytes(n / rows))))
    fail(kFakeGrad, "mask must be the one that fake_quantize_train made for " + shape_of("grad", grad) + ", got " +
                        shape_of("mask", mask));
  const Tensor in = as_contiguous(grad), bits = as_contiguous(mask);
  Tensor out = empty_like(grad, grad.scalar_type());
  if (n == 0) return out;
  const auto* passes = static_cast<const uint8_t*>(bits.const_data_ptr());
#if defined(FASTSPARSE_WITH_CUDA)
  if (grad.is_cuda()) {
    on_cuda(grad, [&](void* stream) {
      sm80::fake_quantize_grad(in.const_data_ptr(), dtype, rows, n / rows, passes, out.mutable_data_ptr(), stream);
    });
    return out;
  }
#endif
  fake_quantize_grad(select(), in.const_data_ptr(), dtype, rows, n / rows, passes, out.mutable_data_ptr());
  return out;
}

Tensor quantize_cuda(Tensor x, Tensor scale, MaybeTensor zero_point, Axis axis) {
  check_cuda_kernels(kQuantize);
  return quantize_op(x, scale, zero_point, axis);
}
std::tuple<Tensor, Tensor> token_cuda(Tensor x) {
  check_cuda_kernels(kToken);
  return token_op(x);
}
void token_out_cuda(Tensor x, Tensor codes, Tensor scale) {
  check_cuda_kernels(kToken);
  token_out_op(x, codes, scale);
}
Tensor dequantize_cuda(Tensor codes, Tensor scale, MaybeTensor zero_point, Axis axis, int64_t dtype) {
  check_cuda_kernels(kDequantize);
  return dequantize_op(codes, scale, zero_point, axis, dtype);
}
Tensor fake_cuda(Tensor x, Tensor scale, MaybeTensor zero_point, int64_t bits, Axis axis) {
  check_cuda_kernels(kFake);
  return fake_op(x, scale, zero_point, bits, axis);
}
std::tuple<Tensor, Tensor> fake_train_cuda(Tensor x, Tensor scale, MaybeTensor zero_point, int64_t bits, Axis axis) {
  check_cuda_kernels(kFake);
  return fake_train_op(x, scale, zero_point, bits, axis);
}
Tensor fake_backward_cuda(Tensor grad, Tensor mask) {
  check_cuda_kernels(kFakeGrad);
  return fake_backward_op(grad, mask);
}

}  // namespace
}  // namespace fs::qdq

STABLE_TORCH_LIBRARY_FRAGMENT(fastsparse, m) {
  m.def("quantize(Tensor x, Tensor scale, Tensor? zero_point=None, int? axis=None) -> Tensor");
  m.def("quantize_per_token(Tensor x) -> (Tensor, Tensor)");
  m.def("quantize_per_token_out(Tensor x, Tensor(a!) codes, Tensor(b!) scale) -> ()");
  m.def("dequantize(Tensor codes, Tensor scale, Tensor? zero_point=None, int? axis=None, int dtype=0) -> Tensor");
  m.def("fake_quantize(Tensor x, Tensor scale, Tensor? zero_point=None, int bits=8, int? axis=None) -> Tensor");
  // The same kernel under a name that carries autograd, with the mask of where the gradient passes.
  m.def(
      "fake_quantize_train(Tensor x, Tensor scale, Tensor? zero_point=None, int bits=8, int? axis=None) "
      "-> (Tensor, Tensor)");
  m.def("fake_quantize_backward(Tensor grad, Tensor mask) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CPU, m) {
  m.impl("quantize", TORCH_BOX(&fs::qdq::quantize_op));
  m.impl("quantize_per_token", TORCH_BOX(&fs::qdq::token_op));
  m.impl("quantize_per_token_out", TORCH_BOX(&fs::qdq::token_out_op));
  m.impl("dequantize", TORCH_BOX(&fs::qdq::dequantize_op));
  m.impl("fake_quantize", TORCH_BOX(&fs::qdq::fake_op));
  m.impl("fake_quantize_train", TORCH_BOX(&fs::qdq::fake_train_op));
  m.impl("fake_quantize_backward", TORCH_BOX(&fs::qdq::fake_backward_op));
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&fs::qdq::quantize_cuda));
  m.impl("quantize_per_token", TORCH_BOX(&fs::qdq::token_cuda));
  m.impl("quantize_per_token_out", TORCH_BOX(&fs::qdq::token_out_cuda));
  m.impl("dequantize", TORCH_BOX(&fs::qdq::dequantize_cuda));
  m.impl("fake_quantize", TORCH_BOX(&fs::qdq::fake_cuda));
  m.impl("fake_quantize_train", TORCH_BOX(&fs::qdq::fake_train_cuda));
  m.impl("fake_quantize_backward", TORCH_BOX(&fs::qdq::fake_backward_cuda));
}
