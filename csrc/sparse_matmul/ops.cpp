// sparse_matmul: schemas and tensor checks. The only file of the family that knows torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstring>
#include <optional>

#include "../runtime/checks.h"
#include "formats/sparse.h"
#include "select.h"
#include "sparse_matmul.h"

namespace fs::sparse_matmul {
namespace {

constexpr const char* kLinear = "sparse_linear";

const uint8_t* pack_bytes(const char* op, const char* name, const Tensor& pack) {
  check_dtype(op, name, pack, ScalarType::Byte);
  if (pack.dim() != 1 || !pack.is_contiguous())
    fail(op, std::string(name) + " must be a pack, a contiguous uint8 vector made by ops.pack(), got " +
                 shape_of(name, pack));
  return static_cast<const uint8_t*>(pack.const_data_ptr());
}

Tensor linear_cpu(Tensor x, Tensor weight, int64_t n, std::optional<Tensor> bias, int64_t activation) {
  check_cpu(kLinear, "x", x);
  check_dtype(kLinear, "x", x, ScalarType::Float);
  const int64_t dims = x.dim();
  if (dims < 1) fail(kLinear, "x must have at least one dimension, got x[]");
  check_same_device(kLinear, "weight", weight, x);
  LinearArgs args{};
  const std::string error = formats::view(pack_bytes(kLinear, "weight", weight), weight.numel(), &args.weight);
  if (!error.empty()) fail(kLinear, "weight must be a sparse float32 pack: " + error);
  if (n >= 0 && n != args.weight.n)
    fail(kLinear, "out_features must be the pack's N=" + std::to_string(args.weight.n) + ", got " + std::to_string(n));
  n = args.weight.n;
  const int64_t k = args.weight.k;
  if (x.size(dims - 1) != k)
    fail(kLinear,
         "x must have K=" + std::to_string(k) + " columns to match the packed weight, got " + shape_of("x", x));
  if (bias.has_value()) {
    check_same_device(kLinear, "bias", *bias, x);
    check_dtype(kLinear, "bias", *bias, ScalarType::Float);
    check_vector(kLinear, "bias", *bias, n);
  }
  if (activation < 0 || activation > 3)
    fail(kLinear, "activation must be 0 (none), 1 (relu), 2 (gelu) or 3 (silu), got " + std::to_string(activation));

  // Rows that lie apart by a constant step are read where they are; anything else is copied.
  const bool strided_matrix = dims == 2 && x.stride(1) == 1 && x.stride(0) >= k;
  const Tensor rows = strided_matrix ? x : as_contiguous(x);
  const Tensor bias_vector = bias.has_value() ? as_contiguous(*bias) : weight;
  args.m = 1;
  int64_t shape[64];  // torch allows no more dimensions
  for (int64_t i = 0; i + 1 < dims; ++i) args.m *= shape[i] = x.size(i);
  shape[dims - 1] = n;
  Tensor y = empty(x, shape, dims, ScalarType::Float);
  args.x = static_cast<const float*>(rows.const_data_ptr());
  args.x_stride = strided_matrix ? x.stride(0) : k;
  args.bias = bias.has_value() ? static_cast<const float*>(bias_vector.const_data_ptr()) : nullptr;
  args.activation = static_cast<Activation>(activation);
  args.y = static_cast<float*>(y.mutable_data_ptr());
  linear(select(), args);
  return y;
}

Tensor train_cpu(Tensor x, Tensor weight, int64_t n, std::optional<Tensor> bias) {
  return linear_cpu(x, weight, n, bias, 0);
}

Tensor linear_cuda(Tensor, Tensor, int64_t, std::optional<Tensor>, int64_t) {
  throw std::runtime_error("sparse_linear: x is on cuda, and there is no CUDA kernel for sparse_linear yet");
}

Tensor train_cuda(Tensor x, Tensor weight, int64_t n, std::optional<Tensor> bias) {
  return linear_cuda(x, weight, n, bias, 0);
}

Tensor pack_cpu(Tensor weight, int64_t format) {
  constexpr const char* kOp = "sparse_pack";
  check_cpu(kOp, "weight", weight);
  check_dtype(kOp, "weight", weight, ScalarType::Float);
  if (weight.dim() != 2) fail(kOp, "weight must be a matrix [N, K], got " + shape_of("weight", weight));
  const int64_t n = weight.size(0), k = weight.size(1);
  if (n >= kLargestSide || k >= kLargestSide)
    fail(kOp, "weight must have sides below 2^31, got " + shape_of("weight", weight));
  if (format < formats::kBitmap32 || format > formats::kPanels128)
    fail(kOp, "format must be 2 (bitmap32), 3 (sell16) or 4 (panels128), got " + std::to_string(format));
  if (format == formats::kSell16 && k > kMaxSellK)
    fail(kOp, "weight must have at most K=65536 columns for sell16, whose indices have 16 bits, got " +
                  shape_of("weight", weight));
  const std::vector<uint8_t> bytes =
      formats::pack(static_cast<formats::Format>(format), static_cast<const float*>(weight.const_data_ptr()),
                    weight.stride(0), weight.stride(1), n, k);
  Tensor out = empty(weight, std::array{static_cast<int64_t>(bytes.size())}.data(), 1, ScalarType::Byte);
  std::memcpy(out.mutable_data_ptr(), bytes.data(), bytes.size());
  return out;
}

Pack valid_pack(const char* op, const Tensor& pack) {
  check_cpu(op, "pack", pack);
  const uint8_t* bytes = pack_bytes(op, "pack", pack);
  const std::string error = formats::validate(bytes, pack.numel());
  if (!error.empty()) fail(op, "pack must be a sparse float32 pack: " + error);
  Pack p;
  formats::view(bytes, pack.numel(), &p);
  return p;
}

int64_t validate_cpu(Tensor pack) { return valid_pack("sparse_validate", pack).total; }

Tensor unpack_cpu(Tensor pack, int64_t n, int64_t k) {
  const Pack p = valid_pack("sparse_unpack", pack);
  if (p.n != n || p.k != k)
    fail("sparse_unpack", "pack must be of [N=" + std::to_string(n) + ", K=" + std::to_string(k) +
                              "], got [N=" + std::to_string(p.n) + ", K=" + std::to_string(p.k) + "]");
  Tensor out = empty(pack, std::array{n, k}.data(), 2, ScalarType::Float);
  formats::unpack(p, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace fs::sparse_matmul

STABLE_TORCH_LIBRARY_FRAGMENT(fastsparse, m) {
  // n: the pack's N, which a fake kernel can't read from its bytes; -1 where it need not
  m.def("sparse_linear(Tensor x, Tensor weight, int n, Tensor? bias=None, int activation=0) -> Tensor");
  // The same kernel under a name that carries autograd, without the activation (int8_gemm/ops.cpp says why).
  m.def("sparse_linear_train(Tensor x, Tensor weight, int n, Tensor? bias=None) -> Tensor");
  m.def("sparse_pack(Tensor weight, int format) -> Tensor");
  m.def("sparse_validate(Tensor pack) -> int");
  m.def("sparse_unpack(Tensor pack, int n, int k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CUDA, m) {
  m.impl("sparse_linear", TORCH_BOX(&fs::sparse_matmul::linear_cuda));
  m.impl("sparse_linear_train", TORCH_BOX(&fs::sparse_matmul::train_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&fs::sparse_matmul::linear_cpu));
  m.impl("sparse_linear_train", TORCH_BOX(&fs::sparse_matmul::train_cpu));
  m.impl("sparse_pack", TORCH_BOX(&fs::sparse_matmul::pack_cpu));
  m.impl("sparse_validate", TORCH_BOX(&fs::sparse_matmul::validate_cpu));
  m.impl("sparse_unpack", TORCH_BOX(&fs::sparse_matmul::unpack_cpu));
}
