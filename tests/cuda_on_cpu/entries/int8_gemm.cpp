// The launchers of csrc/int8_gemm/cuda as plain C functions for ctypes.
#include "../../../csrc/int8_gemm/cuda/sm80.h"
#include "../runtime/entry.h"

namespace sm80 = fs::int8_gemm::sm80;

extern "C" {

FS_ENTRY int64_t int8_gemm_scratch_bytes(int64_t m, int64_t k) { return sm80::scratch_bytes(m, k); }

// dtype -1: x is codes.
FS_ENTRY const char* int8_gemm_linear(const void* x, int dtype, int64_t x_stride, int64_t m, int64_t n, int64_t k,
                                      const uint8_t* weight, const float* weight_scale, const float* bias,
                                      int activation, int dynamic, float x_scale, int32_t x_zero_point,
                                      const float* x_scales, const void* residual, int64_t residual_stride, int y_dtype,
                                      int requantize, float y_scale, int32_t y_zero_point, void* y, uint8_t* scratch) {
  return fs::simt::guarded([&] {
    fs::int8_gemm::LinearArgs a{};
    a.x = x;
    a.x_codes = dtype < 0;
    a.dtype = dtype < 0 ? fs::DType::f32 : static_cast<fs::DType>(dtype);
    a.x_stride = x_stride;
    a.m = m;
    a.n = n;
    a.k = k;
    a.weight = weight;
    a.weight_scale = weight_scale;
    a.bias = bias;
    a.activation = static_cast<fs::Activation>(activation);
    a.dynamic = dynamic != 0;
    a.x_scale = x_scale;
    a.x_zero_point = x_zero_point;
    a.x_scales = x_scales;
    a.residual = residual;
    a.residual_stride = residual_stride;
    a.y_dtype = static_cast<fs::DType>(y_dtype);
    a.requantize = requantize != 0;
    a.y_scale = y_scale;
    a.y_zero_point = y_zero_point;
    a.y = y;
    sm80::linear(a, scratch, nullptr);
  });
}

FS_ENTRY int64_t int8_gemm_weight_only_scratch_bytes(int64_t m, int64_t k) {
  return sm80::weight_only_scratch_bytes(m, k);
}

FS_ENTRY const char* int8_gemm_weight_only(const void* x, int dtype, int64_t x_stride, int64_t m, int64_t n, int64_t k,
                                           const uint8_t* weight, const float* weight_scale, const float* bias,
                                           int activation, void* y, uint8_t* scratch) {
  return fs::simt::guarded([&] {
    fs::int8_gemm::WeightOnlyArgs a{};
    a.x = x;
    a.dtype = static_cast<fs::DType>(dtype);
    a.x_stride = x_stride;
    a.m = m;
    a.n = n;
    a.k = k;
    a.weight = weight;
    a.weight_scale = weight_scale;
    a.bias = bias;
    a.activation = static_cast<fs::Activation>(activation);
    a.y = y;
    sm80::weight_only_linear(a, scratch, nullptr);
  });
}
}
