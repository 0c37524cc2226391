// sparse_int8_linear and its packs: schemas and tensor checks, beside those of ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstring>
#include <optional>

#include "../runtime/checks.h"
#include "../runtime/finite.h"
#include "formats/bitmap_s8.h"
#include "formats/blocks_s8.h"
#include "formats/sparse_s8.h"
#include "formats/windows_s8.h"
#include "int8.h"
#include "int8_select.h"

namespace fs::sparse_matmul::int8 {
namespace {

constexpr const char* kLinear = "sparse_int8_linear";

std::string sides(int64_t n, int64_t k) { return "[N=" + std::to_string(n) + ", K=" + std::to_string(k) + "]"; }

const uint8_t* pack_data(const char* op, const char* name, const Tensor& t) {
  check_dtype(op, name, t, ScalarType::Byte);
  if (t.dim() != 1 || !t.is_contiguous())
    fail(op,
         std::string(name) + " must be a pack, a contiguous uint8 vector made by ops.pack(), got " + shape_of(name, t));
  return static_cast<const uint8_t*>(t.const_data_ptr());
}

Tensor linear_cpu(Tensor x, Tensor weight, Tensor weight_scale, std::optional<Tensor> bias, int64_t activation) {
  check_cpu(kLinear, "x", x);
  const DType dtype = float_dtype(kLinear, "x", x);
  const int64_t dims = x.dim();
  if (dims < 1) fail(kLinear, "x must have at least one dimension, got x[]");
  check_same_device(kLinear, "weight", weight, x);
  Weight w{};
  const std::string error = view(pack_data(kLinear, "weight", weight), weight.numel(), false, &w);
  if (!error.empty()) fail(kLinear, "weight must be a sparse int8 pack: " + error);
  const int64_t n = w.n, k = w.k;
  if (x.size(dims - 1) != k)
    fail(kLinear,
         "x must have K=" + std::to_string(k) + " columns to match the packed weight, got " + shape_of("x", x));
  check_same_device(kLinear, "weight_scale", weight_scale, x);
  check_dtype(kLinear, "weight_scale", weight_scale, ScalarType::Float);
  check_vector(kLinear, "weight_scale", weight_scale, n);
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
  const Tensor scales = as_contiguous(weight_scale), biases = bias.has_value() ? as_contiguous(*bias) : weight_scale;
  int64_t m = 1;
  int64_t shape[64];  // torch allows no more dimensions
  for (int64_t i = 0; i + 1 < dims; ++i) m *= shape[i] = x.size(i);
  shape[dims - 1] = n;
  Tensor y = empty(x, shape, dims, x.scalar_type());
  LinearArgs args{};
  args.layout = w.layout;
  args.bitmap = w.bitmap;
  args.windows = w.windows;
  args.blocks = w.blocks;
  args.x = rows.const_data_ptr();
  args.dtype = dtype;
  args.x_stride = strided_matrix ? x.stride(0) : k;
  args.m = m;
  args.weight_scale = static_cast<const float*>(scales.const_data_ptr());
  args.bias = bias.has_value() ? static_cast<const float*>(biases.const_data_ptr()) : nullptr;
  args.activation = static_cast<Activation>(activation);
  args.y = y.mutable_data_ptr();
  if (!all_finite(args.weight_scale, n)) fail(kLinear, "weight_scale must be finite, got a NaN or an infinity in it");
  linear(select(), args);
  return y;
}

// Under a name that carries autograd, without the activation (int8_gemm/ops.cpp says why).
Tensor train_cpu(Tensor x, Tensor weight, Tensor weight_scale, std::optional<Tensor> bias) {
  return linear_cpu(x, weight, weight_scale, bias, 0);
}

[[noreturn]] void no_cuda() {
  throw std::runtime_error("sparse_int8_linear: x is on cuda, and there is no CUDA kernel for it yet; use int8_linear");
}
Tensor linear_cuda(Tensor, Tensor, Tensor, std::optional<Tensor>, int64_t) { no_cuda(); }
Tensor train_cuda(Tensor, Tensor, Tensor, std::optional<Tensor>) { no_cuda(); }

// block: outputs of a block, 1 or 4; 0 for bitmap_s8, 32 for windows_s8
Tensor pack_cpu(Tensor weight, int64_t block) {
  constexpr const char* kOp = "sparse_int8_pack";
  check_cpu(kOp, "weight", weight);
  check_dtype(kOp, "weight", weight, ScalarType::Char);
  if (weight.dim() != 2) fail(kOp, "weight must be a matrix [N, K], got " + shape_of("weight", weight));
  if (block != 0 && block != 1 && block != 4 && block != kWindowOutputs)
    fail(kOp,
         "block must be 0 (bitmap_s8), 1 (blocks1x4), 4 (blocks4x4) or 32 (windows_s8), got " + std::to_string(block));
  const int64_t n = weight.size(0), k = weight.size(1);
  if (k > kMaxK || n >= kLargestSide)
    fail(kOp, "weight must have at most K=" + std::to_string(kMaxK) +
                  " columns for the sums to be exact in int32, and fewer than 2^31 rows, got " +
                  shape_of("weight", weight));
  const auto* data = static_cast<const int8_t*>(weight.const_data_ptr());
  const int64_t stride_n = weight.stride(0), stride_k = weight.stride(1);
  const std::vector<uint8_t> bytes = block == 0                ? bitmap_s8::pack(data, stride_n, stride_k, n, k)
                                     : block == kWindowOutputs ? windows_s8::pack(data, stride_n, stride_k, n, k)
                                                               : blocks_s8::pack(data, stride_n, stride_k, n, k, block);
  Tensor out = empty_pack(weight, static_cast<int64_t>(bytes.size()));
  std::memcpy(out.mutable_data_ptr(), bytes.data(), bytes.size());
  return out;
}

Weight valid_pack(const char* op, const Tensor& pack) {
  check_cpu(op, "pack", pack);
  Weight w{};
  const std::string error = view(pack_data(op, "pack", pack), pack.numel(), true, &w);
  if (!error.empty()) fail(op, "pack must be a sparse int8 pack: " + error);
  return w;
}

int64_t validate_cpu(Tensor pack) { return valid_pack("sparse_int8_validate", pack).n; }

Tensor unpack_cpu(Tensor pack, int64_t n, int64_t k) {
  const Weight w = valid_pack("sparse_int8_unpack", pack);
  if (w.n != n || w.k != k) fail("sparse_int8_unpack", "pack must be of " + sides(n, k) + ", got " + sides(w.n, w.k));
  Tensor out = empty(pack, std::array{n, k}.data(), 2, ScalarType::Char);
  unpack(w, static_cast<int8_t*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace fs::sparse_matmul::int8

STABLE_TORCH_LIBRARY_FRAGMENT(fastsparse, m) {
  m.def(
      "sparse_int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, int activation=0) -> "
      "Tensor");
  m.def("sparse_int8_linear_train(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None) -> Tensor");
  m.def("sparse_int8_pack(Tensor weight, int block) -> Tensor");
  m.def("sparse_int8_validate(Tensor pack) -> int");
  m.def("sparse_int8_unpack(Tensor pack, int n, int k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CUDA, m) {
  m.impl("sparse_int8_linear", TORCH_BOX(&fs::sparse_matmul::int8::linear_cuda));
  m.impl("sparse_int8_linear_train", TORCH_BOX(&fs::sparse_matmul::int8::train_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CPU, m) {
  m.impl("sparse_int8_linear", TORCH_BOX(&fs::sparse_matmul::int8::linear_cpu));
  m.impl("sparse_int8_linear_train", TORCH_BOX(&fs::sparse_matmul::int8::train_cpu));
  m.impl("sparse_int8_pack", TORCH_BOX(&fs::sparse_matmul::int8::pack_cpu));
  m.impl("sparse_int8_validate", TORCH_BOX(&fs::sparse_matmul::int8::validate_cpu));
  m.impl("sparse_int8_unpack", TORCH_BOX(&fs::sparse_matmul::int8::unpack_cpu));
}
