// The launchers of csrc/sparse_matmul/cuda as plain C functions for ctypes.
#include <cstring>
#include <stdexcept>

#include "../../../csrc/sparse_matmul/cuda/sm80.h"
#include "../../../csrc/sparse_matmul/formats/sparse.h"
#include "../runtime/entry.h"

namespace formats = fs::sparse_matmul::formats;
namespace sm80 = fs::sparse_matmul::sm80;

namespace {

sm80::Rows rows(const void* x, int dtype, int64_t x_stride, int64_t m, const float* bias, int activation, void* y) {
  return {x, static_cast<fs::DType>(dtype), x_stride, m, bias, static_cast<fs::Activation>(activation), y};
}

}  // namespace

extern "C" {

FS_ENTRY const char* sparse_matmul_bitmap32(const void* x, int dtype, int64_t x_stride, int64_t m, const uint8_t* pack,
                                            int64_t pack_bytes, const float* bias, int activation, void* y) {
  return fs::simt::guarded([&] {
    fs::sparse_matmul::Pack weight;
    const std::string error = formats::view(pack, pack_bytes, &weight);
    if (!error.empty()) throw std::invalid_argument(error);
    sm80::linear_bitmap32(weight, rows(x, dtype, x_stride, m, bias, activation, y), nullptr);
  });
}

FS_ENTRY const char* sparse_matmul_bitmap16(const void* x, int dtype, int64_t x_stride, int64_t m, const uint8_t* pack,
                                            int64_t pack_bytes, const float* bias, int activation, void* y) {
  return fs::simt::guarded([&] {
    fs::PackHeader header;
    std::memcpy(&header, pack, sizeof header);
    fs::sparse_matmul::bitmap16::Weight weight;
    const std::string error = fs::sparse_matmul::bitmap16::view(header, pack, pack_bytes, &weight);
    if (!error.empty()) throw std::invalid_argument(error);
    sm80::linear_bitmap16(weight, rows(x, dtype, x_stride, m, bias, activation, y), nullptr);
  });
}

FS_ENTRY const char* sparse_matmul_nm24(const void* x, int dtype, int64_t x_stride, int64_t m, const uint8_t* pack,
                                        int64_t pack_bytes, const float* bias, int activation, void* y) {
  return fs::simt::guarded([&] {
    fs::PackHeader header;
    std::memcpy(&header, pack, sizeof header);
    fs::sparse_matmul::nm24::Weight weight;
    const std::string error = fs::sparse_matmul::nm24::view(header, pack, pack_bytes, &weight);
    if (!error.empty()) throw std::invalid_argument(error);
    sm80::linear_nm24(weight, rows(x, dtype, x_stride, m, bias, activation, y), nullptr);
  });
}

FS_ENTRY const char* sparse_matmul_blocks16(const void* x, int dtype, int64_t x_stride, int64_t m, const uint8_t* pack,
                                            int64_t pack_bytes, const float* bias, int activation, void* y) {
  return fs::simt::guarded([&] {
    fs::PackHeader header;
    std::memcpy(&header, pack, sizeof header);
    fs::sparse_matmul::blocks16::Weight weight;
    const std::string error = fs::sparse_matmul::blocks16::view(header, pack, pack_bytes, &weight);
    if (!error.empty()) throw std::invalid_argument(error);
    sm80::linear_blocks16(weight, rows(x, dtype, x_stride, m, bias, activation, y), nullptr);
  });
}

FS_ENTRY int64_t sparse_matmul_scratch_floats(int64_t n, int64_t k, int64_t m, int sddmm) {
  const sm80::Csr weight{n, k, 0, nullptr, false, nullptr};
  return sddmm != 0 ? sm80::sddmm_scratch_floats(weight, m) : sm80::spmm_scratch_floats(weight, m);
}

FS_ENTRY const char* sparse_matmul_spmm(const void* crow, int wide, const int32_t* col, const float* values,
                                        int64_t nonzeros, int64_t n, int64_t k, const float* x, int64_t x_stride,
                                        int64_t m, float* y, float* scratch) {
  return fs::simt::guarded(
      [&] { sm80::spmm({n, k, nonzeros, crow, wide != 0, col}, values, x, x_stride, m, y, scratch, nullptr); });
}

FS_ENTRY const char* sparse_matmul_sddmm(const void* crow, int wide, const int32_t* col, int64_t nonzeros, int64_t n,
                                         int64_t k, const float* dy, int64_t dy_stride, const float* x,
                                         int64_t x_stride, int64_t m, float* grad, float* scratch) {
  return fs::simt::guarded([&] {
    sm80::sddmm({n, k, nonzeros, crow, wide != 0, col}, dy, dy_stride, x, x_stride, m, grad, scratch, nullptr);
  });
}
}
