// sparse_matmul, training: schemas and tensor checks of what training.h states.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstring>
#include <optional>
#include <tuple>

#include "../runtime/checks.h"
#if defined(FASTSPARSE_WITH_CUDA)
#include "../runtime/cuda/torch_stream.h"
#include "cuda/sm80.h"
#endif
#include "formats/structure.h"
#include "select.h"
#include "training.h"
#include "training_ops.h"

namespace fs::sparse_matmul {
namespace {

std::string text(int64_t value) { return std::to_string(value); }
const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

const uint8_t* structure_bytes(const char* op, const Tensor& structure) {
  check_dtype(op, "structure", structure, ScalarType::Byte);
  if (structure.dim() != 1 || !structure.is_contiguous())
    fail(op, "structure must be a contiguous uint8 vector made by ops.sparse_structure(), got " +
                 shape_of("structure", structure));
  return static_cast<const uint8_t*>(structure.const_data_ptr());
}

StructureView view_of(const char* op, const Tensor& structure) {
  check_cpu(op, "structure", structure);
  StructureView view;
  const std::string error = formats::view_structure(structure_bytes(op, structure), structure.numel(), &view);
  if (!error.empty()) fail(op, "structure must be a sparse structure: " + error);
  return view;
}

void check_float(const char* op, const char* name, const Tensor& t) {
  check_cpu(op, name, t);
  check_dtype(op, name, t, ScalarType::Float);
}

// A float32 vector on the device of x.
Tensor checked_vector(const char* op, const char* name, const Tensor& t, int64_t length, const Tensor& x) {
  check_same_device(op, name, t, x);
  check_dtype(op, name, t, ScalarType::Float);
  check_vector(op, name, t, length);
  return as_contiguous(t);
}

// --- Structures ------------------------------------------------------------------------------------------------------

// crow and col as int64, contiguous; `values` says how many columns there must be. The tensors keep the memory alive.
formats::Csr checked_csr(const char* op, const Tensor& crow, const Tensor& col, int64_t n, int64_t k) {
  check_cpu(op, "crow", crow);
  check_cpu(op, "col", col);
  check_dtype(op, "crow", crow, ScalarType::Long);
  check_dtype(op, "col", col, ScalarType::Long);
  if (n < 0 || k < 0 || n >= kLargestSide || k >= kLargestSide)
    fail(op, "the sides must lie between 0 and 2^31, got [N=" + text(n) + ", K=" + text(k) + "]");
  check_vector(op, "crow", crow, n + 1);
  if (col.dim() != 1) fail(op, "col must be a vector, got " + shape_of("col", col));
  if (!crow.is_contiguous() || !col.is_contiguous()) fail(op, "crow and col must be contiguous");
  const formats::Csr csr{static_cast<const int64_t*>(crow.const_data_ptr()),
                         static_cast<const int64_t*>(col.const_data_ptr()), n, k, col.numel()};
  if (csr.nonzeros > kMaxPlaces)
    fail(op, "there must be at most " + text(kMaxPlaces) + " values, got " + text(csr.nonzeros));
  const std::string error = formats::check_csr(csr);
  if (!error.empty()) fail(op, error);
  return csr;
}

int64_t check_csr_cpu(Tensor crow, Tensor col, int64_t n, int64_t k) {
  return checked_csr("sparse_check_csr", crow, col, n, k).nonzeros;
}

Tensor structure_cpu(Tensor crow, Tensor col, int64_t n, int64_t k) {
  const std::vector<uint8_t> bytes = formats::pack_structure(checked_csr("sparse_structure", crow, col, n, k));
  Tensor out = empty(crow, std::array{static_cast<int64_t>(bytes.size())}.data(), 1, ScalarType::Byte);
  std::memcpy(out.mutable_data_ptr(), bytes.data(), bytes.size());
  return out;
}

std::tuple<Tensor, Tensor> indices_cpu(Tensor structure) {
  constexpr const char* kOp = "sparse_structure_indices";
  std::vector<int64_t> crow, col;
  check_cpu(kOp, "structure", structure);
  const std::string error = formats::read_structure(structure_bytes(kOp, structure), structure.numel(), &crow, &col);
  if (!error.empty()) fail(kOp, "structure must be a sparse structure: " + error);
  const auto tensor = [&](const std::vector<int64_t>& from) {
    Tensor out = empty(structure, std::array{static_cast<int64_t>(from.size())}.data(), 1, ScalarType::Long);
    if (!from.empty()) std::memcpy(out.mutable_data_ptr(), from.data(), from.size() * sizeof(int64_t));
    return out;
  };
  return {tensor(crow), tensor(col)};
}

Tensor csr_to_dense_cpu(Tensor crow, Tensor col, Tensor values, int64_t n, int64_t k) {
  constexpr const char* kOp = "csr_to_dense";
  const formats::Csr csr = checked_csr(kOp, crow, col, n, k);
  const Tensor kept = checked_vector(kOp, "values", values, csr.nonzeros, crow);
  Tensor out = empty(values, std::array{n, k}.data(), 2, ScalarType::Float);
  if (n == 0 || k == 0) return out;
  auto* dense = static_cast<float*>(out.mutable_data_ptr());
  std::memset(dense, 0, static_cast<size_t>(n * k) * sizeof(float));
  for (int64_t r = 0; r < n; ++r)
    for (int64_t i = csr.crow[r]; i < csr.crow[r + 1]; ++i) dense[r * k + csr.col[i]] = floats(kept)[i];
  return out;
}

// --- Products --------------------------------------------------------------------------------------------------------

constexpr const char* kLinear = "sparse_linear";
constexpr const char* kSddmm = "sparse_sddmm";

// A matrix whose rows or columns lie together, read where it is; anything else is copied.
Tensor readable(const Tensor& t, Strided* out) {
  const bool by_rows = t.stride(1) == 1 && t.stride(0) >= t.size(1);
  const bool by_columns = t.stride(0) == 1 && t.stride(1) >= t.size(0);
  const Tensor kept = by_rows || by_columns ? t : torch::stable::contiguous(t);
  *out = {floats(kept), by_rows || !by_columns ? kept.stride(0) : 1, by_rows || !by_columns ? 1 : kept.stride(1)};
  return kept;
}

// The arguments of a product but for x itself, checked, with the tensors that keep their memory alive.
struct CheckedProduct {
  int64_t inner, outer, m;
  Tensor values, bias, y;
  const float* bias_data;  // or null
};

// `n`: what the caller says, or -1.
CheckedProduct check_product(const Tensor& x, const StructureView& view, const Tensor& values, int64_t n,
                             bool transposed, const std::optional<Tensor>& bias, int64_t activation) {
  const int64_t dims = x.dim(), inner = transposed ? view.n : view.k, outer = transposed ? view.k : view.n;
  if (n >= 0 && n != outer) fail(kLinear, "the outputs must be the structure's " + text(outer) + ", got " + text(n));
  if (x.size(dims - 1) != inner)
    fail(kLinear, std::string("x must have ") + (transposed ? "N=" : "K=") + text(inner) +
                      " columns to match the structure, got " + shape_of("x", x));
  const Tensor kept = checked_vector(kLinear, "values", values, view.nonzeros, x);
  const Tensor kept_bias = bias.has_value() ? checked_vector(kLinear, "bias", *bias, outer, x) : kept;
  if (activation < 0 || activation > 3)
    fail(kLinear, "activation must be 0 (none), 1 (relu), 2 (gelu) or 3 (silu), got " + text(activation));
  int64_t m = 1, shape[64];  // torch allows no more dimensions
  for (int64_t i = 0; i + 1 < dims; ++i) m *= shape[i] = x.size(i);
  shape[dims - 1] = outer;
  return {inner,
          outer,
          m,
          kept,
          kept_bias,
          empty(x, shape, dims, ScalarType::Float),
          bias.has_value() ? floats(kept_bias) : nullptr};
}

// `z`: null, or where the result before gelu or silu goes, an empty tensor for the others.
Tensor product_on_cpu(const Tensor& x, const Tensor& structure, const Tensor& values, int64_t n, bool transposed,
                      const std::optional<Tensor>& bias, int64_t activation, Tensor* z) {
  check_float(kLinear, "x", x);
  if (x.dim() < 1) fail(kLinear, "x must have at least one dimension, got x[]");
  const StructureView view = view_of(kLinear, structure);
  CheckedProduct c = check_product(x, view, values, n, transposed, bias, activation);
  const bool strided = x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= c.inner;
  const Tensor rows = strided ? x : as_contiguous(x);
  const auto act = static_cast<Activation>(activation);
  const bool keep = z != nullptr && (act == Activation::gelu || act == Activation::silu);
  if (z != nullptr) *z = keep ? empty_as(c.y) : empty_vector(x);
  product(select(),
          {&view, floats(c.values), transposed, floats(rows), strided ? x.stride(0) : c.inner, c.m, c.bias_data, act,
           static_cast<float*>(c.y.mutable_data_ptr()), keep ? static_cast<float*>(z->mutable_data_ptr()) : nullptr});
  return c.y;
}

Tensor product_cpu(Tensor x, Tensor structure, Tensor values, int64_t n, bool transposed, std::optional<Tensor> bias,
                   int64_t activation) {
  return product_on_cpu(x, structure, values, n, transposed, bias, activation, nullptr);
}

std::tuple<Tensor, Tensor> product_train_cpu(Tensor x, Tensor structure, Tensor values, int64_t n, bool transposed,
                                             std::optional<Tensor> bias, int64_t activation) {
  Tensor z;
  Tensor y = product_on_cpu(x, structure, values, n, transposed, bias, activation, &z);
  return {y, z};
}

// saved: y of relu, z of gelu and silu.
Tensor activation_grad_cpu(Tensor grad, Tensor saved, int64_t activation) {
  constexpr const char* kOp = "sparse_activation_grad";
  check_float(kOp, "grad", grad);
  check_float(kOp, "saved", saved);
  bool same = grad.dim() == saved.dim();
  for (int64_t i = 0; same && i < grad.dim(); ++i) same = grad.size(i) == saved.size(i);
  if (!same) fail(kOp, "saved must have the shape of " + shape_of("grad", grad) + ", got " + shape_of("saved", saved));
  if (activation < 1 || activation > 3)
    fail(kOp, "activation must be 1 (relu), 2 (gelu) or 3 (silu), got " + text(activation));
  const Tensor from = as_contiguous(grad), kept = as_contiguous(saved);
  Tensor out = empty_as(grad);
  activation_grad(select(), {floats(from), floats(kept), static_cast<Activation>(activation), grad.numel(),
                             static_cast<float*>(out.mutable_data_ptr())});
  return out;
}

// `nonzeros`: what the caller says, or -1.
void check_sddmm(const Tensor& p, const Tensor& q, const StructureView& view, int64_t nonzeros) {
  if (p.dim() != 2 || p.size(1) != view.n)
    fail(kSddmm, "p must be a matrix [M, N=" + text(view.n) + "], got " + shape_of("p", p));
  if (q.dim() != 2 || q.size(1) != view.k || q.size(0) != p.size(0))
    fail(kSddmm, "q must be a matrix [M=" + text(p.size(0)) + ", K=" + text(view.k) + "], got " + shape_of("q", q));
  if (nonzeros >= 0 && nonzeros != view.nonzeros)
    fail(kSddmm, "the values must be as many as the structure's " + text(view.nonzeros) + ", got " + text(nonzeros));
}

Tensor sddmm_cpu(Tensor p, Tensor q, Tensor structure, int64_t nonzeros) {
  check_float(kSddmm, "p", p);
  check_float(kSddmm, "q", q);
  const StructureView view = view_of(kSddmm, structure);
  check_sddmm(p, q, view, nonzeros);
  SampleProductArgs args{&view, {}, {}, p.size(0), nullptr};
  const Tensor kept_p = readable(p, &args.p), kept_q = readable(q, &args.q);
  Tensor values = empty(p, &view.nonzeros, 1, ScalarType::Float);
  args.values = static_cast<float*>(values.mutable_data_ptr());
  sample(select(), args);
  return values;
}

#if defined(FASTSPARSE_WITH_CUDA)
// A structure on the device of x, by the sizes that the caller's tensors have; where they don't tell (a size is -1), by
// its header, for which the host waits.
StructureView device_view(const char* op, const Tensor& structure, const Tensor& x, int64_t n, int64_t k,
                          int64_t nonzeros, sm80::HeaderIs* is) {
  check_same_device(op, "structure", structure, x);
  const uint8_t* bytes = structure_bytes(op, structure);
  const int64_t size = structure.numel();
  PackHeader header = formats::structure_header(n, k, nonzeros, size);
  if (n < 0 || k < 0 || nonzeros < 0) {
    if (size < kPackHeaderBytes)
      fail(op, "structure must be a sparse structure: got " + text(size) + " bytes, its headers alone have 128");
    header = host_header(structure);
  }
  StructureView view;
  const std::string error = formats::view_tables(header, bytes, size, &view);
  if (!error.empty()) fail(op, "structure must be a sparse structure: " + error);
  if (reinterpret_cast<uintptr_t>(bytes) % 16 != 0)
    fail(op, "structure must begin at a multiple of 16 bytes on CUDA; clone() it");
  *is = sm80::header_is(bytes, header, sm80::HeaderIs::kNonzeros);
  return view;
}

Tensor byte_scratch(const Tensor& like, int64_t bytes) { return empty(like, &bytes, 1, ScalarType::Byte); }

Tensor product_cuda(Tensor x, Tensor structure, Tensor values, int64_t n, bool transposed, std::optional<Tensor> bias,
                    int64_t activation) {
  check_proven(kLinear, sm80::kName, sm80::kProven);
  check_dtype(kLinear, "x", x, ScalarType::Float);
  if (x.dim() < 1) fail(kLinear, "x must have at least one dimension, got x[]");
  const int64_t inner = x.size(x.dim() - 1);
  sm80::HeaderIs is;
  const StructureView view = device_view(kLinear, structure, x, transposed ? inner : n, transposed ? n : inner,
                                         values.dim() == 1 ? values.numel() : -1, &is);
  CheckedProduct c = check_product(x, view, values, n, transposed, bias, activation);
  Strided rows{nullptr, inner, 1};
  const Tensor kept = x.dim() == 2 ? readable(x, &rows) : as_contiguous(x);
  rows.data = floats(kept);
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(x.get_device_index()));
  Tensor scratch = byte_scratch(x, sm80::product_scratch_bytes(view, transposed, c.m));
  sm80::product({&view, transposed, floats(c.values), rows, c.m, c.bias_data, static_cast<Activation>(activation),
                 static_cast<float*>(c.y.mutable_data_ptr()), is},
                scratch.mutable_data_ptr(), current_cuda_stream(x));
  return c.y;
}

Tensor sddmm_cuda(Tensor p, Tensor q, Tensor structure, int64_t nonzeros) {
  check_proven("sddmm", sm80::kName, sm80::kProven);
  check_dtype(kSddmm, "p", p, ScalarType::Float);
  check_dtype(kSddmm, "q", q, ScalarType::Float);
  check_same_device(kSddmm, "q", q, p);
  sm80::HeaderIs is;
  const StructureView view =
      device_view(kSddmm, structure, p, p.dim() == 2 ? p.size(1) : -1, q.dim() == 2 ? q.size(1) : -1, nonzeros, &is);
  check_sddmm(p, q, view, nonzeros);
  SampleProductArgs args{&view, {}, {}, p.size(0), nullptr};
  const Tensor kept_p = readable(p, &args.p), kept_q = readable(q, &args.q);
  Tensor values = empty(p, &view.nonzeros, 1, ScalarType::Float);
  args.values = static_cast<float*>(values.mutable_data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(p.get_device_index()));
  Tensor scratch = byte_scratch(p, sm80::sample_scratch_bytes(view, args.m));
  sm80::sample(args, is, scratch.mutable_data_ptr(), current_cuda_stream(p));
  return values;
}
#else
[[noreturn]] void no_cuda(const char* op) {
  throw std::runtime_error(std::string(op) +
                           ": an argument is on cuda, and this build of fastsparse has no CUDA "
                           "kernels (FASTSPARSE_CUDA=ON makes one)");
}
Tensor product_cuda(Tensor, Tensor, Tensor, int64_t, bool, std::optional<Tensor>, int64_t) { no_cuda(kLinear); }
Tensor sddmm_cuda(Tensor, Tensor, Tensor, int64_t) { no_cuda("sddmm"); }
#endif

std::tuple<Tensor, Tensor> product_train_cuda(Tensor x, Tensor structure, Tensor values, int64_t n, bool transposed,
                                              std::optional<Tensor> bias, int64_t activation) {
  check_no_activation(kLinear, activation);
  return {product_cuda(x, structure, values, n, transposed, bias, 0), empty_vector(x)};
}

}  // namespace
}  // namespace fs::sparse_matmul

STABLE_TORCH_LIBRARY_FRAGMENT(fastsparse, m) {
  m.def("sparse_check_csr(Tensor crow, Tensor col, int n, int k) -> int");
  m.def("sparse_structure(Tensor crow, Tensor col, int n, int k) -> Tensor");
  m.def("sparse_structure_indices(Tensor structure) -> (Tensor, Tensor)");
  m.def("csr_to_dense(Tensor crow, Tensor col, Tensor values, int n, int k) -> Tensor");
  // n: the columns of y, which a fake kernel can't read from the structure's bytes; -1 where it need not. So nonzeros.
  m.def(
      "sparse_values_linear(Tensor x, Tensor structure, Tensor values, int n, bool transposed, Tensor? bias=None, "
      "int activation=0) -> Tensor");
  // The same under a name that carries autograd: y, and what stands before gelu or silu (else [0]).
  m.def(
      "sparse_values_linear_train(Tensor x, Tensor structure, Tensor values, int n, bool transposed, Tensor? "
      "bias=None, int activation=0) -> (Tensor, Tensor)");
  m.def("sparse_activation_grad(Tensor grad, Tensor saved, int activation) -> Tensor");
  m.def("sparse_sddmm(Tensor p, Tensor q, Tensor structure, int nonzeros) -> Tensor");
  m.def("sparse_sddmm_train(Tensor p, Tensor q, Tensor structure, int nonzeros) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CUDA, m) {
  m.impl("sparse_values_linear", TORCH_BOX(&fs::sparse_matmul::product_cuda));
  m.impl("sparse_values_linear_train", TORCH_BOX(&fs::sparse_matmul::product_train_cuda));
  m.impl("sparse_sddmm", TORCH_BOX(&fs::sparse_matmul::sddmm_cuda));
  m.impl("sparse_sddmm_train", TORCH_BOX(&fs::sparse_matmul::sddmm_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CPU, m) {
  m.impl("sparse_check_csr", TORCH_BOX(&fs::sparse_matmul::check_csr_cpu));
  m.impl("sparse_structure", TORCH_BOX(&fs::sparse_matmul::structure_cpu));
  m.impl("sparse_structure_indices", TORCH_BOX(&fs::sparse_matmul::indices_cpu));
  m.impl("csr_to_dense", TORCH_BOX(&fs::sparse_matmul::csr_to_dense_cpu));
  m.impl("sparse_values_linear", TORCH_BOX(&fs::sparse_matmul::product_cpu));
  m.impl("sparse_values_linear_train", TORCH_BOX(&fs::sparse_matmul::product_train_cpu));
  m.impl("sparse_activation_grad", TORCH_BOX(&fs::sparse_matmul::activation_grad_cpu));
  m.impl("sparse_sddmm", TORCH_BOX(&fs::sparse_matmul::sddmm_cpu));
  m.impl("sparse_sddmm_train", TORCH_BOX(&fs::sparse_matmul::sddmm_cpu));
}
