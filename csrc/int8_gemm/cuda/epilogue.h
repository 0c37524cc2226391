// What becomes of the sums of int8_linear, on CUDA: int8_gemm.h has the formula. Four columns of a row at a time.
// Device code.
#pragma once
#include "../../qdq/cuda/rows.h"
#include "../../runtime/cuda/activate.h"
#include "../../runtime/cuda/device.h"
#include "../../runtime/dtype.h"

namespace fs::int8_gemm::sm80 {

struct Epilogue {
  const float* x_scale;  // [m], or null: one_x_scale for all
  float one_x_scale;
  const float* weight_scale;
  const float* bias;          // or null
  const int32_t* column_sum;  // of the weights
  int32_t zero_point;         // of x
  Activation activation;
  const void* residual;  // of y_dtype, or null
  int64_t residual_stride;
  void* y;  // [m, n] of y_dtype, or of s8 if requantize
  int64_t n;
  DType y_dtype;
  bool requantize;
  float inverse_y_scale;
  int32_t y_zero_point;
};

// Four elements beside each other as one access, where that is allowed.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

template <class T>
__device__ __forceinline__ void load_four(const T* p, int count, float (&x)[4]) {
  if (count == 4 && is_aligned(p, sizeof(Four<T>))) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(p);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = to_float(four.at[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = j < count ? to_float(p[j]) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void store_four(T* p, int count, const float (&y)[4]) {
  Four<T> four;
#pragma unroll
  for (int j = 0; j < 4; ++j) four.at[j] = from_float<T>(y[j]);
  if (count == 4 && is_aligned(p, sizeof(Four<T>))) {
    *reinterpret_cast<Four<T>*>(p) = four;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < count) p[j] = four.at[j];
  }
}

// Finished values of float32, rounded to y's type. `at`: of the first.
__device__ __forceinline__ void store_floats(void* y, DType dtype, int64_t at, int count, const float (&values)[4]) {
  switch (dtype) {
    case DType::f32: return store_four(static_cast<float*>(y) + at, count, values);
    case DType::bf16: return store_four(static_cast<__nv_bfloat16*>(y) + at, count, values);
    default: return store_four(static_cast<__half*>(y) + at, count, values);
  }
}

// What four columns multiply and add.
struct Columns {
  int count;  // of them that there are
  float scale[4], bias[4];
  int32_t sum[4];  // what the zero point adds to each of their sums
};

__device__ __forceinline__ Columns columns_of(const Epilogue& e, int64_t column) {
  Columns c{};
  c.count = static_cast<int>(min(e.n - column, int64_t{4}));
  load_four(e.weight_scale + column, c.count, c.scale);
#pragma unroll
  for (int j = 0; j < 4; ++j) c.bias[j] = -0.0f;  // adds nothing, not even to -0
  if (e.bias != nullptr) load_four(e.bias + column, c.count, c.bias);
  if (e.zero_point != 0) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < c.count) c.sum[j] = e.zero_point * e.column_sum[column + j];
  }
  return c;
}

__device__ __forceinline__ void finish(const Epilogue& e, const Columns& c, int64_t row, int64_t column, uint4 bits) {
  int32_t sum[4];
  memcpy(sum, &bits, 16);
  const float x_scale = e.x_scale != nullptr ? e.x_scale[row] : e.one_x_scale;
  float y[4];
#pragma unroll
  for (int j = 0; j < 4; ++j)
    y[j] = __fmaf_rn(static_cast<float>(sum[j] - c.sum[j]), __fmul_rn(x_scale, c.scale[j]), c.bias[j]);
  if (e.residual != nullptr) {
    const int64_t at = row * e.residual_stride + column;
    float residual[4];
    switch (e.y_dtype) {
      case DType::f32: load_four(static_cast<const float*>(e.residual) + at, c.count, residual); break;
      case DType::bf16: load_four(static_cast<const __nv_bfloat16*>(e.residual) + at, c.count, residual); break;
      default: load_four(static_cast<const __half*>(e.residual) + at, c.count, residual); break;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j] = __fadd_rn(y[j], residual[j]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) y[j] = activate(e.activation, y[j]);
  const int64_t at = row * e.n + column;
  if (!e.requantize) return store_floats(e.y, e.y_dtype, at, c.count, y);
  Four<int8_t> codes;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    codes.at[j] =
        static_cast<int8_t>(max(-128, min(127, qdq::sm80::static_code(y[j], e.inverse_y_scale, e.y_zero_point))));
  auto* p = static_cast<int8_t*>(e.y) + at;
  if (c.count == 4 && is_aligned(p, 4)) {
    *reinterpret_cast<Four<int8_t>*>(p) = codes;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < c.count) p[j] = codes.at[j];
  }
}

}  // namespace fs::int8_gemm::sm80
