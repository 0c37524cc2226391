// The launchers of csrc/sparse_matmul/cuda as plain C functions for ctypes.
#include <cstring>
#include <stdexcept>

#include "../../../csrc/sparse_matmul/cuda/sm80.h"
#include "../../../csrc/sparse_matmul/formats/sparse.h"
#include "../runtime/entry.h"

namespace formats = fs::sparse_matmul::formats;
namespace sm80 = fs::sparse_matmul::sm80;
using fs::sparse_matmul::StructureView;

namespace {

// `pack`: its header is held against `header`; null: it is not.
sm80::Rows rows(const void* x, int dtype, int64_t x_stride, int64_t m, const float* bias, int activation, void* y,
                const uint8_t* pack, const fs::PackHeader& header) {
  return {
      x,    static_cast<fs::DType>(dtype),           x_stride, m,
      bias, static_cast<fs::Activation>(activation), y,        sm80::header_is(pack, header, sm80::HeaderIs::kShape)};
}

// The pack's own header or, as the op has it from a caller who knows `kind`, n and k, a described one.
fs::PackHeader header_of(const uint8_t* pack, int64_t bytes, int64_t kind, int64_t n, int64_t k) {
  if (kind >= 0) return formats::described(kind, n, k, bytes);
  fs::PackHeader h;
  std::memcpy(&h, pack, sizeof h);
  return h;
}

// A structure on the device, taken apart by what the caller knows.
struct OnDevice {
  StructureView view{};
  sm80::HeaderIs header;
  OnDevice(const uint8_t* bytes, int64_t size, int64_t n, int64_t k, int64_t nonzeros) {
    const fs::PackHeader h = formats::structure_header(n, k, nonzeros, size);
    const std::string error = formats::view_tables(h, bytes, size, &view);
    if (!error.empty()) throw std::invalid_argument(error);
    header = sm80::header_is(bytes, h, sm80::HeaderIs::kNonzeros);
  }
};

}  // namespace

extern "C" {

FS_ENTRY const char* sparse_matmul_bitmap32(const void* x, int dtype, int64_t x_stride, int64_t m, const uint8_t* pack,
                                            int64_t pack_bytes, int64_t kind, int64_t n, int64_t k, const float* bias,
                                            int activation, void* y) {
  return fs::simt::guarded([&] {
    const fs::PackHeader h = header_of(pack, pack_bytes, kind, n, k);
    fs::sparse_matmul::Pack weight;
    const std::string error = formats::view_bitmap32(h, pack, pack_bytes, &weight);
    if (!error.empty()) throw std::invalid_argument(error);
    sm80::linear_bitmap32(weight, rows(x, dtype, x_stride, m, bias, activation, y, pack, h), nullptr);
  });
}

FS_ENTRY const char* sparse_matmul_bitmap16(const void* x, int dtype, int64_t x_stride, int64_t m, const uint8_t* pack,
                                            int64_t pack_bytes, int64_t kind, int64_t n, int64_t k, const float* bias,
                                            int activation, void* y) {
  return fs::simt::guarded([&] {
    const fs::PackHeader h = header_of(pack, pack_bytes, kind, n, k);
    fs::sparse_matmul::bitmap16::Weight weight;
    const std::string error = fs::sparse_matmul::bitmap16::view(h, pack, pack_bytes, &weight);
    if (!error.empty()) throw std::invalid_argument(error);
    sm80::linear_bitmap16(weight, rows(x, dtype, x_stride, m, bias, activation, y, pack, h), nullptr);
  });
}

FS_ENTRY const char* sparse_matmul_nm24(const void* x, int dtype, int64_t x_stride, int64_t m, const uint8_t* pack,
                                        int64_t pack_bytes, int64_t kind, int64_t n, int64_t k, const float* bias,
                                        int activation, void* y) {
  return fs::simt::guarded([&] {
    const fs::PackHeader h = header_of(pack, pack_bytes, kind, n, k);
    fs::sparse_matmul::nm24::Weight weight;
    const std::string error = fs::sparse_matmul::nm24::view(h, pack, pack_bytes, &weight);
    if (!error.empty()) throw std::invalid_argument(error);
    sm80::linear_nm24(weight, rows(x, dtype, x_stride, m, bias, activation, y, pack, h), nullptr);
  });
}

FS_ENTRY const char* sparse_matmul_blocks16(const void* x, int dtype, int64_t x_stride, int64_t m, const uint8_t* pack,
                                            int64_t pack_bytes, int64_t kind, int64_t n, int64_t k, const float* bias,
                                            int activation, void* y) {
  return fs::simt::guarded([&] {
    const fs::PackHeader h = header_of(pack, pack_bytes, kind, n, k);
    fs::sparse_matmul::blocks16::Weight weight;
    const std::string error = fs::sparse_matmul::blocks16::view(h, pack, pack_bytes, &weight);
    if (!error.empty()) throw std::invalid_argument(error);
    sm80::linear_blocks16(weight, rows(x, dtype, x_stride, m, bias, activation, y, pack, h), nullptr);
  });
}

FS_ENTRY int64_t sparse_matmul_scratch_floats(int64_t n, int64_t k, int64_t m, int sddmm) {
  const sm80::Csr weight{n, k, 0, nullptr, nullptr, nullptr, nullptr};
  return sddmm != 0 ? sm80::sddmm_scratch_floats(weight, m) : sm80::spmm_scratch_floats(weight, m);
}

FS_ENTRY const char* sparse_matmul_spmm(const int32_t* crow, const int32_t* col, const float* values, int64_t nonzeros,
                                        int64_t n, int64_t k, const float* x, int64_t x_stride, int64_t m, float* y,
                                        float* scratch) {
  return fs::simt::guarded([&] {
    const sm80::Csr weight{n, k, nonzeros, crow, crow + 1, col, nullptr};
    sm80::spmm({weight, values, {x, x_stride, 1}, m, nullptr, fs::Activation::none, y, {}}, scratch, nullptr);
  });
}

FS_ENTRY const char* sparse_matmul_sddmm(const int32_t* crow, const int32_t* col, int64_t nonzeros, int64_t n,
                                         int64_t k, const float* dy, int64_t dy_stride, const float* x,
                                         int64_t x_stride, int64_t m, float* grad, float* scratch) {
  return fs::simt::guarded([&] {
    const sm80::Csr weight{n, k, nonzeros, crow, crow + 1, col, nullptr};
    sm80::sddmm({weight, {dy, dy_stride, 1}, {x, x_stride, 1}, m, grad, {}}, scratch, nullptr);
  });
}

// --- From a structure, whose sizes are the caller's ------------------------------------------------------------------

FS_ENTRY int64_t sparse_matmul_structure_scratch(int64_t n, int64_t k, int64_t nonzeros, int64_t m, int what) {
  StructureView view{};
  view.n = n, view.k = k, view.nonzeros = nonzeros;
  return what == 2 ? sm80::sample_scratch_bytes(view, m) : sm80::product_scratch_bytes(view, what == 1, m);
}

FS_ENTRY const char* sparse_matmul_product(const uint8_t* structure, int64_t bytes, int64_t n, int64_t k,
                                           const float* values, int64_t nonzeros, int transposed, const float* x,
                                           int64_t row_stride, int64_t column_stride, int64_t m, const float* bias,
                                           int activation, float* y, void* scratch) {
  return fs::simt::guarded([&] {
    const OnDevice s(structure, bytes, n, k, nonzeros);
    sm80::product({&s.view,
                   transposed != 0,
                   values,
                   {x, row_stride, column_stride},
                   m,
                   bias,
                   static_cast<fs::Activation>(activation),
                   y,
                   s.header},
                  scratch, nullptr);
  });
}

FS_ENTRY const char* sparse_matmul_sample(const uint8_t* structure, int64_t bytes, int64_t n, int64_t k,
                                          int64_t nonzeros, const float* p, int64_t p_row, int64_t p_column,
                                          const float* q, int64_t q_row, int64_t q_column, int64_t m, float* values,
                                          void* scratch) {
  return fs::simt::guarded([&] {
    const OnDevice s(structure, bytes, n, k, nonzeros);
    sm80::sample({&s.view, {p, p_row, p_column}, {q, q_row, q_column}, m, values}, s.header, scratch, nullptr);
  });
}
}
