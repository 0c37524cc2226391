// sparse_matmul: schemas and tensor checks. The only file of the family that knows torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <variant>

#include "../runtime/checks.h"
#if defined(FASTSPARSE_WITH_CUDA)
#include "../runtime/cuda/torch_stream.h"
#include "cuda/sm80.h"
#endif
#include "formats/bitmap16.h"
#include "formats/blocks16.h"
#include "formats/nm24.h"
#include "formats/packed_format.h"
#include "formats/sparse.h"
#include "select.h"
#include "sparse_matmul.h"
#include "training_ops.h"

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

// The arguments of sparse_linear but for the pack, checked, with the tensors that keep their memory alive.
struct CheckedRows {
  Tensor rows, bias, y;
  int64_t m, x_stride;
  const float* bias_data;  // or null
};

// `n`: what the caller says, or -1; pack_n, k: what the pack says.
CheckedRows check_rows(const Tensor& x, int64_t n, const std::optional<Tensor>& bias, int64_t activation,
                       int64_t pack_n, int64_t k) {
  const int64_t dims = x.dim();
  if (n >= 0 && n != pack_n)
    fail(kLinear, "out_features must be the pack's N=" + std::to_string(pack_n) + ", got " + std::to_string(n));
  n = pack_n;
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
  int64_t m = 1;
  int64_t shape[64];  // torch allows no more dimensions
  for (int64_t i = 0; i + 1 < dims; ++i) m *= shape[i] = x.size(i);
  shape[dims - 1] = n;
  CheckedRows c{strided_matrix ? x : as_contiguous(x),  bias.has_value() ? as_contiguous(*bias) : x,
                empty(x, shape, dims, x.scalar_type()), m,
                strided_matrix ? x.stride(0) : k,       nullptr};
  if (bias.has_value()) c.bias_data = static_cast<const float*>(c.bias.const_data_ptr());
  return c;
}

bool keeps_z(int64_t activation) {
  return activation == static_cast<int64_t>(Activation::gelu) || activation == static_cast<int64_t>(Activation::silu);
}

// `z`: null, or where the result before gelu or silu goes, an empty tensor for the others.
Tensor linear_on_cpu(const Tensor& x, const Tensor& weight, int64_t n, const std::optional<Tensor>& bias,
                     int64_t activation, Tensor* z) {
  check_cpu(kLinear, "x", x);
  check_dtype(kLinear, "x", x, ScalarType::Float);
  if (x.dim() < 1) fail(kLinear, "x must have at least one dimension, got x[]");
  check_same_device(kLinear, "weight", weight, x);
  LinearArgs args{};
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  const std::string error = formats::view(pack_bytes(kLinear, "weight", weight), weight.numel(), &args.weight, rows);
  if (!error.empty()) fail(kLinear, "weight must be a sparse float32 pack: " + error);
  CheckedRows c = check_rows(x, n, bias, activation, args.weight.n, args.weight.k);
  args.m = c.m;
  args.x = static_cast<const float*>(c.rows.const_data_ptr());
  args.x_stride = c.x_stride;
  args.bias = c.bias_data;
  args.activation = static_cast<Activation>(activation);
  args.y = static_cast<float*>(c.y.mutable_data_ptr());
  if (z != nullptr) {
    *z = keeps_z(activation) ? empty_as(c.y) : empty_vector(x);
    args.z = keeps_z(activation) ? static_cast<float*>(z->mutable_data_ptr()) : nullptr;
  }
  linear(select(), args);
  return c.y;
}

Tensor linear_cpu(Tensor x, Tensor weight, int64_t n, std::optional<Tensor> bias, int64_t activation, int64_t) {
  return linear_on_cpu(x, weight, n, bias, activation, nullptr);
}

std::tuple<Tensor, Tensor> train_cpu(Tensor x, Tensor weight, int64_t n, std::optional<Tensor> bias,
                                     int64_t activation) {
  Tensor z;
  Tensor y = linear_on_cpu(x, weight, n, bias, activation, &z);
  return {y, z};
}

#if defined(FASTSPARSE_WITH_CUDA)
Tensor linear_cuda(Tensor x, Tensor weight, int64_t n, std::optional<Tensor> bias, int64_t activation, int64_t kind) {
  check_proven(kLinear, sm80::kName, sm80::kProven);
  const DType dtype = float_dtype(kLinear, "x", x);
  if (x.dim() < 1) fail(kLinear, "x must have at least one dimension, got x[]");
  check_same_device(kLinear, "weight", weight, x);
  const uint8_t* bytes = pack_bytes(kLinear, "weight", weight);
  const int64_t size = weight.numel();
  if (size < kPackHeaderBytes)
    fail(kLinear, "weight must be a sparse pack: got " + std::to_string(size) + " bytes, a header alone has 64");
  const PackHeader header =
      kind >= 0 && n >= 0 ? formats::described(kind, n, x.size(x.dim() - 1), size) : host_header(weight);
  // Of any of these formats: taken apart, the other arguments checked, launched.
  const auto run = [&](auto packed, auto view, auto launcher) {
    const std::string error = view(header, bytes, size, &packed);
    if (!error.empty()) fail(kLinear, "weight must be a sparse pack for CUDA: " + error);
    if constexpr (!std::is_same_v<decltype(packed), Pack>)
      if (dtype != packed.dtype)
        fail(kLinear, std::string("x must be ") + (packed.dtype == DType::f16 ? "float16" : "bfloat16") +
                          " like the packed weight, got " + dtype_name(x.scalar_type()));
    CheckedRows c = check_rows(x, n, bias, activation, header.n, header.k);
    const sm80::Rows rows{c.rows.const_data_ptr(),
                          dtype,
                          c.x_stride,
                          c.m,
                          c.bias_data,
                          static_cast<Activation>(activation),
                          c.y.mutable_data_ptr(),
                          sm80::header_is(bytes, header, sm80::HeaderIs::kShape)};
    const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(x.get_device_index()));
    launcher(packed, rows, current_cuda_stream(x));
    return c.y;
  };
  if (header.format == nm24::kFormat) return run(nm24::Weight{}, &nm24::view, &sm80::linear_nm24);
  if (header.format == blocks16::kFormat) return run(blocks16::Weight{}, &blocks16::view, &sm80::linear_blocks16);
  if (bitmap16::is_bitmap16(header)) return run(bitmap16::Weight{}, &bitmap16::view, &sm80::linear_bitmap16);
  return run(Pack{}, &formats::view_bitmap32, &sm80::linear_bitmap32);
}
#else
Tensor linear_cuda(Tensor, Tensor, int64_t, std::optional<Tensor>, int64_t, int64_t) {
  throw std::runtime_error(
      "sparse_linear: x is on cuda, and this build of fastsparse has no CUDA kernels (FASTSPARSE_CUDA=ON makes one)");
}
#endif

std::tuple<Tensor, Tensor> train_cuda(Tensor x, Tensor weight, int64_t n, std::optional<Tensor> bias,
                                      int64_t activation) {
  check_no_activation(kLinear, activation);
  return {linear_cuda(x, weight, n, bias, 0, -1), empty_vector(x)};
}

Tensor pack_cpu(Tensor weight, int64_t format, int64_t block) {
  constexpr const char* kOp = "sparse_pack";
  check_cpu(kOp, "weight", weight);
  check_dtype(kOp, "weight", weight, ScalarType::Float);
  if (weight.dim() != 2) fail(kOp, "weight must be a matrix [N, K], got " + shape_of("weight", weight));
  const int64_t n = weight.size(0), k = weight.size(1);
  if (n >= kLargestSide || k >= kLargestSide)
    fail(kOp, "weight must have sides below 2^31, got " + shape_of("weight", weight));
  const formats::PackedFormat* const packed = formats::find(format, block);
  if (packed == nullptr)
    fail(kOp, "format must be " + formats::known() + ", got " + std::to_string(format) + " with block " +
                  std::to_string(block));
  if (k > packed->largest_k)
    fail(kOp, "weight must have at most K=" + std::to_string(packed->largest_k) + " columns for " + packed->name +
                  ", got " + shape_of("weight", weight));
  const std::vector<uint8_t> bytes = formats::pack(*packed, static_cast<const float*>(weight.const_data_ptr()),
                                                   weight.stride(0), weight.stride(1), n, k);
  Tensor out = empty_pack(weight, static_cast<int64_t>(bytes.size()));
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

// --- float16 and bfloat16 weights; of bfloat16 bitmap32, sell8 and panels128 run on the CPU, too -------------------

// A sell8 or panels128 of a bfloat16 weight [n, k].
std::vector<uint8_t> pack_bf16(const formats::PackedFormat& format, const Tensor& weight, const uint16_t* bits) {
  const int64_t n = weight.size(0), k = weight.size(1);
  std::vector<float> wide(static_cast<size_t>(n * k));
  for (int64_t row = 0; row < n; ++row)
    for (int64_t column = 0; column < k; ++column) {
      const uint32_t high = uint32_t{bits[row * weight.stride(0) + column * weight.stride(1)]} << 16;
      std::memcpy(&wide[static_cast<size_t>(row * k + column)], &high, 4);
    }
  return formats::pack(format, wide.data(), k, 1, n, k);
}

Tensor half_pack_cpu(Tensor weight, int64_t format, int64_t block) {
  constexpr const char* kOp = "half_pack";
  check_cpu(kOp, "weight", weight);
  const DType dtype = float_dtype(kOp, "weight", weight);
  if (dtype == DType::f32) fail(kOp, "weight must be float16 or bfloat16, got float32");
  if (weight.dim() != 2) fail(kOp, "weight must be a matrix [N, K], got " + shape_of("weight", weight));
  const int64_t n = weight.size(0), k = weight.size(1);
  if (n >= kLargestSide || k >= kLargestSide)
    fail(kOp, "weight must have sides below 2^31, got " + shape_of("weight", weight));
  const auto* bits = static_cast<const uint16_t*>(weight.const_data_ptr());
  std::vector<uint8_t> bytes;
  if (format == nm24::kFormat) {
    nm24::NotSparse where;
    bytes = nm24::pack(bits, weight.stride(0), weight.stride(1), n, k, dtype, &where);
    if (where.row >= 0)
      fail(kOp, "weight must have at most 2 of every 4 consecutive k not zero (2:4) for nm24, got " +
                    std::to_string(where.count) + " in row " + std::to_string(where.row) + ", k " +
                    std::to_string(where.k) + " to " + std::to_string(where.k + 3));
  } else if (format == blocks16::kFormat) {
    bytes = blocks16::pack(bits, weight.stride(0), weight.stride(1), n, k, dtype);
  } else if (format == bitmap16::kFormat) {
    bytes = bitmap16::pack(bits, weight.stride(0), weight.stride(1), n, k, dtype);
  } else if (format == kSell8 || format == kPanels128) {
    const formats::PackedFormat* const packed = formats::find(format, block, formats::kDTypeBf16);
    if (packed == nullptr)
      fail(kOp, "block must be 64 (sell8), 32 (sell8x32) or 192 (panels128), got " + std::to_string(block));
    if (dtype != DType::bf16)
      fail(kOp, std::string("weight must be bfloat16 or float32 for ") + packed->name + ", got float16");
    if (k > packed->largest_k)
      fail(kOp, "weight must have at most K=" + std::to_string(packed->largest_k) + " columns for " + packed->name +
                    ", got " + shape_of("weight", weight));
    bytes = pack_bf16(*packed, weight, bits);
  } else {
    fail(kOp, "format must be 2 (bitmap32), 4 (panels128), 5 (nm24), 8 (sell8) or 14 (blocks16), got " +
                  std::to_string(format));
  }
  Tensor out = empty_pack(weight, static_cast<int64_t>(bytes.size()));
  std::memcpy(out.mutable_data_ptr(), bytes.data(), bytes.size());
  return out;
}

// A pack of any of these formats, validated, and what undoes it.
struct HalfPack {
  int64_t n, k;
  DType dtype;
  std::variant<nm24::Weight, blocks16::Weight, bitmap16::Weight, Pack> weight;
};

HalfPack valid_half(const char* op, const Tensor& pack) {
  check_cpu(op, "pack", pack);
  const uint8_t* bytes = pack_bytes(op, "pack", pack);
  const int64_t size = pack.numel();
  PackHeader header{};
  std::memcpy(&header, bytes, static_cast<size_t>(std::min<int64_t>(size, sizeof header)));
  const auto valid = [&](auto weight, auto validate, const char* name) -> HalfPack {
    const std::string error = validate(bytes, size, &weight);
    if (!error.empty()) fail(op, std::string("pack must be ") + name + " pack: " + error);
    return {weight.n, weight.k, weight.dtype, weight};
  };
  if (header.format == blocks16::kFormat) return valid(blocks16::Weight{}, &blocks16::validate, "a blocks16");
  if (header.format == kSell8 || header.format == kPanels128) {
    const std::string name = header.format == kSell8 ? "sell8" : "panels128";
    const std::string error = formats::validate(bytes, size);
    if (!error.empty()) fail(op, "pack must be a bfloat16 " + name + " pack: " + error);
    if (header.dtype != formats::kDTypeBf16) fail(op, "pack must be a bfloat16 " + name + " pack: got one of float32");
    Pack p;
    formats::view(bytes, size, &p);
    return {p.n, p.k, DType::bf16, p};
  }
  if (bitmap16::is_bitmap16(header)) return valid(bitmap16::Weight{}, &bitmap16::validate, "a 16-bit bitmap32");
  return valid(nm24::Weight{}, &nm24::validate, "an nm24");
}

// Into a contiguous bfloat16 [n, k].
void unpack(const Pack& p, uint16_t* weight) {
  std::vector<float> wide(static_cast<size_t>(p.n * p.k));
  formats::unpack(p, wide.data());
  for (size_t i = 0; i < wide.size(); ++i) std::memcpy(weight + i, reinterpret_cast<const uint8_t*>(&wide[i]) + 2, 2);
}

int64_t half_validate_cpu(Tensor pack) { return valid_half("half_validate", pack).n; }

Tensor half_unpack_cpu(Tensor pack, int64_t n, int64_t k, bool bfloat16) {
  const HalfPack p = valid_half("half_unpack", pack);
  if (p.n != n || p.k != k || (p.dtype == DType::bf16) != bfloat16)
    fail("half_unpack", "pack must be of [N=" + std::to_string(n) + ", K=" + std::to_string(k) +
                            "] and the dtype asked for, got [N=" + std::to_string(p.n) + ", K=" + std::to_string(p.k) +
                            "]");
  Tensor out = empty(pack, std::array{n, k}.data(), 2, bfloat16 ? ScalarType::BFloat16 : ScalarType::Half);
  std::visit([&](const auto& weight) { unpack(weight, static_cast<uint16_t*>(out.mutable_data_ptr())); }, p.weight);
  return out;
}

}  // namespace
}  // namespace fs::sparse_matmul

STABLE_TORCH_LIBRARY_FRAGMENT(fastsparse, m) {
  // n: the pack's N, which a fake kernel can't read from its bytes; -1 where it need not. kind: format | dtype << 16 |
  // block << 32 of its header, by the codes there, so that on CUDA no call reads it; -1: unknown. The CPU reads its
  // own.
  m.def("sparse_linear(Tensor x, Tensor weight, int n, Tensor? bias=None, int activation=0, int kind=-1) -> Tensor");
  // The same kernel under a name that carries autograd (int8_gemm/ops.cpp says why): y, and what stands before gelu or
  // silu, for the gradient; else [0].
  m.def("sparse_linear_train(Tensor x, Tensor weight, int n, Tensor? bias=None, int activation=0) -> (Tensor, Tensor)");
  m.def("sparse_pack(Tensor weight, int format, int block=0) -> Tensor");
  m.def("sparse_validate(Tensor pack) -> int");
  m.def("sparse_unpack(Tensor pack, int n, int k) -> Tensor");
  m.def("half_pack(Tensor weight, int format, int block=0) -> Tensor");
  m.def("half_validate(Tensor pack) -> int");
  m.def("half_unpack(Tensor pack, int n, int k, bool bfloat16) -> Tensor");
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
  m.impl("half_pack", TORCH_BOX(&fs::sparse_matmul::half_pack_cpu));
  m.impl("half_validate", TORCH_BOX(&fs::sparse_matmul::half_validate_cpu));
  m.impl("half_unpack", TORCH_BOX(&fs::sparse_matmul::half_unpack_cpu));
}
