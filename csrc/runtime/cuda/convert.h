// Floats of a kernel's boundary to float32 and back, one by one and eight at a time. Included by device.h.
#pragma once

namespace fs {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// To nearest, half to even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Whether `bytes` bytes at p may be accessed as one.
__device__ __forceinline__ bool is_aligned(const void* p, unsigned bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// 16 bytes as elements: what one 16-byte access moves.
template <class T>
struct alignas(16) Vector16 {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(T));
  T at[kCount];
};

}  // namespace fs
