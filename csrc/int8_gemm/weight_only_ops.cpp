// weight_only_linear and its packs: schemas and tensor checks, beside those of ops.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../runtime/checks.h"
#if defined(FASTSPARSE_WITH_CUDA)
#include "../runtime/cuda/torch_stream.h"
#include "cuda/sm80.h"
#endif
#include "formats/bitmap_u4.h"
#include "formats/u4.h"
#include "formats/vnni16.h"
#include "int8_gemm.h"
#include "select.h"

namespace fs::int8_gemm {
namespace {

constexpr const char* kOp = "weight_only_linear";

std::string sides(int64_t n, int64_t k) { return "[N=" + std::to_string(n) + ", K=" + std::to_string(k) + "]"; }

const uint8_t* pack_data(const char* op, const char* name, const Tensor& t) {
  check_dtype(op, name, t, ScalarType::Byte);
  if (t.dim() != 1 || !t.is_contiguous())
    fail(op,
         std::string(name) + " must be a pack, a contiguous uint8 vector made by ops.pack(), got " + shape_of(name, t));
  return static_cast<const uint8_t*>(t.const_data_ptr());
}

// The rows of x and everything but the weight, checked, with the tensors that keep their memory alive.
struct Checked {
  WeightOnlyArgs args;
  BitmapU4 bitmap;  // group 0: the weight is none
  Tensor rows, scales, bias, y;
};

// The pack says that it is a bitmap_u4; whether it is one is for bitmap_u4::header_error().
bool is_bitmap(const uint8_t* pack, int64_t bytes) {
  PackHeader h;
  if (bytes < kPackHeaderBytes) return false;
  std::memcpy(&h, pack, sizeof h);
  return std::memcmp(h.magic, "fspk", 4) == 0 && h.format == bitmap_u4::kFormat;
}

// A u4 pack in device memory, whose header the kernels read: N is what the caller says, and the length must be that of
// one of the kinds.
u4::Layout device_layout(const Tensor& weight, int64_t n, int64_t k, const std::optional<Tensor>& bias) {
  if (n < 0 && bias.has_value() && bias->dim() == 1) n = bias->size(0);
  if (n < 0) fail(kOp, "out_features must be given on cuda where there is no bias: the pack's header is not read here");
  for (const int64_t group : {32, 64, 128})
    for (const bool affine : {false, true}) {
      const u4::Layout layout{n, k, group, affine};
      if (layout.bytes() == weight.numel()) return layout;
    }
  fail(kOp, "weight must be a u4 pack of " + sides(n, k) + " where weight_scale is None, got " +
                std::to_string(weight.numel()) + " bytes");
}

// n: what the caller says N is, or -1; pack_n, pack_k: what the weight says.
Checked check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& weight_scale, int64_t n,
              const std::optional<Tensor>& bias, int64_t activation) {
  check_given(kOp, "weight", weight);
  const DType dtype = float_dtype(kOp, "x", x);
  const int64_t dims = x.dim();
  if (dims < 1) fail(kOp, "x must have at least one dimension, got x[]");
  const int64_t k = x.size(dims - 1);
  check_same_device(kOp, "weight", weight, x);
  const uint8_t* pack = pack_data(kOp, "weight", weight);
  int64_t pack_n, pack_k = k;
  BitmapU4 bitmap{};
  if (weight_scale.has_value()) {
    check_same_device(kOp, "weight_scale", *weight_scale, x);
    check_dtype(kOp, "weight_scale", *weight_scale, ScalarType::Float);
    if (weight_scale->dim() != 1)
      fail(kOp, "weight_scale must have shape [N], got " + shape_of("weight_scale", *weight_scale));
    pack_n = weight_scale->size(0);
    const std::string error = x.is_cpu() ? vnni16::header_error(pack, weight.numel(), pack_n, k)
                              : weight.numel() == vnni16::pack_bytes(pack_n, k)
                                  ? ""
                                  : "got " + std::to_string(weight.numel()) + " bytes, expected " +
                                        std::to_string(vnni16::pack_bytes(pack_n, k)) + " for " + sides(pack_n, k);
    if (!error.empty()) {
      pack_k = x.is_cpu() ? vnni16::packed_k(pack, weight.numel(), pack_n) : -1;
      if (pack_k < 0)
        fail(kOp,
             "weight must be a vnni16 pack that matches x and weight_scale (a u4 pack has its own scales): " + error);
    }
  } else {
    u4::Layout layout{};
    std::string error;
    if (!x.is_cpu()) {
      layout = device_layout(weight, n, k, bias);
    } else if (is_bitmap(pack, weight.numel())) {
      error = bitmap_u4::header_error(pack, weight.numel(), &bitmap);
      layout = bitmap_u4::layout(bitmap);
    } else {
      error = u4::header_error(pack, weight.numel(), &layout);
    }
    if (!error.empty())
      fail(kOp, "weight must be a u4 pack where weight_scale is None (a vnni16 pack needs one): " + error);
    pack_n = layout.n;
    pack_k = layout.k;
  }
  if (pack_k != k)
    fail(kOp,
         "x must have K=" + std::to_string(pack_k) + " columns to match the packed weight, got " + shape_of("x", x));
  if (n >= 0 && n != pack_n)
    fail(kOp, "out_features must be N=" + std::to_string(pack_n) + " of the packed weight, got " + std::to_string(n));
  if (bias.has_value()) {
    check_same_device(kOp, "bias", *bias, x);
    check_dtype(kOp, "bias", *bias, ScalarType::Float);
    check_vector(kOp, "bias", *bias, pack_n);
  }
  if (activation < 0 || activation > 3)
    fail(kOp, "activation must be 0 (none), 1 (relu), 2 (gelu) or 3 (silu), got " + std::to_string(activation));

  // Rows that lie apart by a constant step are read where they are; anything else is copied.
  const bool strided_matrix = dims == 2 && x.stride(1) == 1 && x.stride(0) >= k;
  int64_t m = 1;
  int64_t shape[64];  // torch allows no more dimensions
  for (int64_t i = 0; i + 1 < dims; ++i) m *= shape[i] = x.size(i);
  shape[dims - 1] = pack_n;
  Checked c{{},
            bitmap,
            strided_matrix ? x : as_contiguous(x),
            weight_scale.has_value() ? as_contiguous(*weight_scale) : x,
            bias.has_value() ? as_contiguous(*bias) : x,
            empty(x, shape, dims, x.scalar_type())};
  c.args.x = c.rows.const_data_ptr();
  c.args.dtype = dtype;
  c.args.x_stride = strided_matrix ? x.stride(0) : k;
  c.args.m = m;
  c.args.n = pack_n;
  c.args.k = k;
  c.args.weight = pack;
  c.args.weight_scale = weight_scale.has_value() ? static_cast<const float*>(c.scales.const_data_ptr()) : nullptr;
  c.args.bias = bias.has_value() ? static_cast<const float*>(c.bias.const_data_ptr()) : nullptr;
  c.args.activation = static_cast<Activation>(activation);
  c.args.y = c.y.mutable_data_ptr();
  return c;
}

Tensor linear_cpu(Tensor x, Tensor weight, std::optional<Tensor> weight_scale, int64_t n, std::optional<Tensor> bias,
                  int64_t activation) {
  check_cpu(kOp, "x", x);
  Checked c = check(x, weight, weight_scale, n, bias, activation);
  if (c.bitmap.group != 0) {
    c.args.bitmap = &c.bitmap;
    c.args.bitmap_kernels = bitmap_kernels();
  }
  weight_only_linear(select(), c.args);
  return c.y;
}

#if defined(FASTSPARSE_WITH_CUDA)
Tensor linear_cuda(Tensor x, Tensor weight, std::optional<Tensor> weight_scale, int64_t n, std::optional<Tensor> bias,
                   int64_t activation) {
  check_proven(kOp, sm80::kName, sm80::kProven);
  const Checked c = check(x, weight, weight_scale, n, bias, activation);
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(x.get_device_index()));
  Tensor scratch =
      empty(x, std::array{sm80::weight_only_scratch_bytes(c.args.m, c.args.k)}.data(), 1, ScalarType::Byte);
  sm80::weight_only_linear(c.args, static_cast<uint8_t*>(scratch.mutable_data_ptr()), current_cuda_stream(x));
  return c.y;
}
#else
Tensor linear_cuda(Tensor, Tensor, std::optional<Tensor>, int64_t, std::optional<Tensor>, int64_t) {
  throw std::runtime_error(
      "weight_only_linear: x is on cuda, and this build of fastsparse has no CUDA kernels (FASTSPARSE_CUDA=ON makes "
      "one)");
}
#endif

Tensor train_cpu(Tensor x, Tensor weight, std::optional<Tensor> weight_scale, int64_t n, std::optional<Tensor> bias) {
  return linear_cpu(x, weight, weight_scale, n, bias, 0);
}

Tensor train_cuda(Tensor x, Tensor weight, std::optional<Tensor> weight_scale, int64_t n, std::optional<Tensor> bias) {
  return linear_cuda(x, weight, weight_scale, n, bias, 0);
}

bool all_within(const Tensor& contiguous, uint8_t offset) {
  const auto* p = static_cast<const uint8_t*>(contiguous.const_data_ptr());
  uint8_t worst = 0;
  for (int64_t i = 0; i < contiguous.numel(); ++i) {
    const auto code = static_cast<uint8_t>(p[i] + offset);
    worst = code > worst ? code : worst;
  }
  return worst <= 15;
}

Tensor u4_pack_cpu(Tensor codes, Tensor scale, std::optional<Tensor> zero_point, int64_t group) {
  constexpr const char* kPack = "u4_pack";
  check_cpu(kPack, "weight", codes);
  const bool affine = zero_point.has_value();
  check_dtype(kPack, "weight", codes, affine ? ScalarType::Byte : ScalarType::Char);
  if (codes.dim() != 2) fail(kPack, "weight must be a matrix [N, K], got " + shape_of("weight", codes));
  if (!u4::is_group(group)) fail(kPack, "group_size must be 32, 64 or 128, got " + std::to_string(group));
  const u4::Layout layout{codes.size(0), codes.size(1), group, affine};
  if (layout.n >= kLargestSide || layout.k >= kLargestSide)
    fail(kPack, "weight must have sides below 2^31, got " + shape_of("weight", codes));
  const auto per_group = [&](const char* name, const Tensor& t, ScalarType dtype) {
    check_cpu(kPack, name, t);
    check_dtype(kPack, name, t, dtype);
    if (t.dim() != 2 || t.size(0) != layout.n || t.size(1) != layout.groups())
      fail(kPack, std::string(name) + " must have shape [" + std::to_string(layout.n) + ", " +
                      std::to_string(layout.groups()) + "], one for each row and group, got " + shape_of(name, t));
    return as_contiguous(t);
  };
  const Tensor scales = per_group("scale", scale, ScalarType::Half);
  const Tensor points = affine ? per_group("zero_point", *zero_point, ScalarType::Byte) : scales;
  const Tensor values = as_contiguous(codes);
  if (!all_within(values, affine ? 0 : 8))
    fail(kPack, affine ? "weight must have codes in [0, 15] where there is a zero_point, got others"
                       : "weight must have codes in [-8, 7], got others");
  if (affine && !all_within(points, 0)) fail(kPack, "zero_point must be in [0, 15], got others");
  const auto* bits = static_cast<const uint16_t*>(scales.const_data_ptr());
  for (int64_t i = 0; i < scales.numel(); ++i)
    if ((bits[i] & 0x7c00) == 0x7c00) fail(kPack, "scale must be finite, got a NaN or an infinity in it");
  Tensor out = empty_pack(codes, layout.bytes());
  u4::pack(layout, static_cast<const uint8_t*>(values.const_data_ptr()), layout.k, 1, bits,
           affine ? static_cast<const uint8_t*>(points.const_data_ptr()) : nullptr,
           static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

// A u4 pack, or what a bitmap_u4 pack holds as one.
struct Dense {
  u4::Layout layout;
  const uint8_t* pack;
  std::vector<uint8_t> made;
};

Dense dense_u4(const char* op, const Tensor& pack) {
  check_cpu(op, "pack", pack);
  Dense dense{{}, pack_data(op, "pack", pack), {}};
  std::string error;
  if (is_bitmap(dense.pack, pack.numel())) {
    BitmapU4 w{};
    error = bitmap_u4::header_error(dense.pack, pack.numel(), &w);
    if (error.empty()) {
      PackHeader h;
      std::memcpy(&h, dense.pack, sizeof h);
      dense.layout = bitmap_u4::layout(w);
      dense.made = bitmap_u4::unpack(w, h.nonzeros);
      dense.pack = dense.made.data();
    }
  } else {
    error = u4::header_error(dense.pack, pack.numel(), &dense.layout);
  }
  if (!error.empty()) fail(op, "pack must be a u4 pack: " + error);
  return dense;
}

int64_t u4_validate_cpu(Tensor pack) {
  constexpr const char* kValidate = "u4_validate";
  const Dense dense = dense_u4(kValidate, pack);
  const auto* bytes = static_cast<const uint8_t*>(pack.const_data_ptr());
  const std::string error =
      dense.pack == bytes ? u4::content_error(dense.layout, bytes) : bitmap_u4::content_error(bytes, pack.numel());
  if (!error.empty()) fail(kValidate, "pack must be a u4 pack: " + error);
  return dense.layout.n;
}

// Codes s8, or u8 if affine; scale f16; zero points u8, of no elements if symmetric.
std::tuple<Tensor, Tensor, Tensor> u4_unpack_cpu(Tensor pack, int64_t n, int64_t k, int64_t group, bool affine) {
  const Dense dense = dense_u4("u4_unpack", pack);
  const u4::Layout& l = dense.layout;
  if (l.n != n || l.k != k || l.group != group || l.affine != affine)
    fail("u4_unpack", "pack must be of " + sides(n, k) + " in groups of " + std::to_string(group) + ", got " +
                          sides(l.n, l.k) + " in groups of " + std::to_string(l.group));
  Tensor codes = empty(pack, std::array{n, k}.data(), 2, affine ? ScalarType::Byte : ScalarType::Char);
  Tensor scale = empty(pack, std::array{n, l.groups()}.data(), 2, ScalarType::Half);
  Tensor zero = empty(pack, std::array{affine ? n : 0, l.groups()}.data(), 2, ScalarType::Byte);
  u4::unpack(l, dense.pack, static_cast<uint8_t*>(codes.mutable_data_ptr()),
             static_cast<uint16_t*>(scale.mutable_data_ptr()), static_cast<uint8_t*>(zero.mutable_data_ptr()));
  return {codes, scale, zero};
}

// (code - zero point) * scale in float32.
Tensor u4_dequantize_cpu(Tensor pack, int64_t n, int64_t k) {
  const Dense dense = dense_u4("u4_dequantize", pack);
  const u4::Layout& l = dense.layout;
  if (l.n != n || l.k != k) fail("u4_dequantize", "pack must be of " + sides(n, k) + ", got " + sides(l.n, l.k));
  Tensor out = empty(pack, std::array{n, k}.data(), 2, ScalarType::Float);
  u4::dequantize(l, dense.pack, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

// A symmetric u4 pack -> the same without its zeros.
Tensor bitmap_u4_pack_cpu(Tensor pack) {
  constexpr const char* kPack = "bitmap_u4_pack";
  const Dense dense = dense_u4(kPack, pack);
  if (dense.layout.affine) fail(kPack, "pack must be symmetric (int4), got one with zero points");
  const std::vector<uint8_t> bytes = bitmap_u4::pack(dense.layout, dense.pack);
  Tensor out = empty_pack(pack, static_cast<int64_t>(bytes.size()));
  std::memcpy(out.mutable_data_ptr(), bytes.data(), bytes.size());
  return out;
}

}  // namespace
}  // namespace fs::int8_gemm

STABLE_TORCH_LIBRARY_FRAGMENT(fastsparse, m) {
  // n: the pack's N, which a fake kernel can't read from its bytes; -1 where it need not
  m.def(
      "weight_only_linear(Tensor x, Tensor weight, Tensor? weight_scale, int n, Tensor? bias=None, int activation=0) "
      "-> Tensor");
  // The same kernel under a name that carries autograd, without the activation (ops.cpp says why).
  m.def("weight_only_linear_train(Tensor x, Tensor weight, Tensor? weight_scale, int n, Tensor? bias=None) -> Tensor");
  m.def("u4_pack(Tensor weight, Tensor scale, Tensor? zero_point, int group_size) -> Tensor");
  m.def("u4_validate(Tensor pack) -> int");
  m.def("u4_unpack(Tensor pack, int n, int k, int group_size, bool affine) -> (Tensor, Tensor, Tensor)");
  m.def("u4_dequantize(Tensor pack, int n, int k) -> Tensor");
  m.def("bitmap_u4_pack(Tensor pack) -> Tensor");  // the others take what it makes, too
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CUDA, m) {
  m.impl("weight_only_linear", TORCH_BOX(&fs::int8_gemm::linear_cuda));
  m.impl("weight_only_linear_train", TORCH_BOX(&fs::int8_gemm::train_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CPU, m) {
  m.impl("weight_only_linear", TORCH_BOX(&fs::int8_gemm::linear_cpu));
  m.impl("weight_only_linear_train", TORCH_BOX(&fs::int8_gemm::train_cpu));
  m.impl("u4_pack", TORCH_BOX(&fs::int8_gemm::u4_pack_cpu));
  m.impl("u4_validate", TORCH_BOX(&fs::int8_gemm::u4_validate_cpu));
  m.impl("u4_unpack", TORCH_BOX(&fs::int8_gemm::u4_unpack_cpu));
  m.impl("u4_dequantize", TORCH_BOX(&fs::int8_gemm::u4_dequantize_cpu));
  m.impl("bitmap_u4_pack", TORCH_BOX(&fs::int8_gemm::bitmap_u4_pack_cpu));
}
