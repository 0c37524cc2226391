// The launchers of csrc/qdq/cuda as plain C functions for ctypes.
#include "../../../csrc/qdq/cuda/sm80.h"
#include "../runtime/entry.h"

namespace sm80 = fs::qdq::sm80;
using fs::DType;

extern "C" {

FS_ENTRY const char* qdq_quantize_per_token(const void* x, int dtype, int64_t x_stride, int64_t rows, int64_t k,
                                            int8_t* codes, float* scale) {
  return fs::simt::guarded([&] {
    sm80::quantize_per_token({x, static_cast<DType>(dtype), x_stride, rows, k, codes, scale, false}, nullptr);
  });
}

FS_ENTRY const char* qdq_quantize(const void* x, int dtype, int64_t outer, int64_t channels, int64_t inner,
                                  const float* scale, const int32_t* zero_point, int8_t* codes) {
  return fs::simt::guarded([&] {
    sm80::quantize(x, static_cast<DType>(dtype), {{outer, channels, inner}, scale, zero_point}, codes, nullptr);
  });
}

FS_ENTRY const char* qdq_dequantize(const int8_t* codes, int dtype, int64_t outer, int64_t channels, int64_t inner,
                                    const float* scale, const int32_t* zero_point, void* y) {
  return fs::simt::guarded([&] {
    sm80::dequantize(codes, {{outer, channels, inner}, scale, zero_point}, y, static_cast<DType>(dtype), nullptr);
  });
}

FS_ENTRY const char* qdq_fake_quantize(const void* x, int dtype, int64_t outer, int64_t channels, int64_t inner,
                                       const float* scale, const int32_t* zero_point, int32_t lowest, int32_t highest,
                                       void* y, uint8_t* mask) {
  return fs::simt::guarded([&] {
    sm80::fake_quantize(x, static_cast<DType>(dtype), {{outer, channels, inner}, scale, zero_point}, lowest, highest, y,
                        mask, nullptr);
  });
}

FS_ENTRY const char* qdq_fake_quantize_grad(const void* grad, int dtype, int64_t rows, int64_t length,
                                            const uint8_t* mask, void* grad_x) {
  return fs::simt::guarded(
      [&] { sm80::fake_quantize_grad(grad, static_cast<DType>(dtype), rows, length, mask, grad_x, nullptr); });
}
}
