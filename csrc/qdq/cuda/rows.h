// How a float becomes an int8 code, on CUDA: the one place for every family that quantizes, as cpu/rows.inl is for the
// CPU, and equal to it bit for bit. Device code.
#pragma once
#include <cfloat>

#include "../../runtime/cuda/device.h"

namespace fs::qdq::sm80 {

constexpr unsigned kAllLanes = 0xffffffffu;

// |x| as an integer: ordered NaN > inf > every finite value.
__device__ __forceinline__ unsigned abs_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

__device__ __forceinline__ unsigned max_of_warp(unsigned value) {
  for (int step = 16; step > 0; step /= 2) value = max(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// The scale of a row with that largest |x|. NaN: the row holds a NaN or an infinity, and its codes are to be 0.
__device__ __forceinline__ float row_scale(unsigned absmax_bits) {
  if (absmax_bits >= 0x7f800000u) return __uint_as_float(0x7fc00000u);
  return absmax_bits == 0 ? 1.0f : fmaxf(__fdiv_rn(__uint_as_float(absmax_bits), 127.0f), FLT_MIN);
}

__device__ __forceinline__ int dynamic_code(float x, float inverse_scale) {
  return __float2int_rn(__fmul_rn(x, inverse_scale));
}

// Static: round(x / scale) + zero_point, NaN as the zero point, not yet clamped to the codes there are. Clamped before
// the conversion: beyond +-256 the code saturates whatever the zero point is.
__device__ __forceinline__ int static_code(float x, float inverse_scale, int zero_point) {
  const float t = __fmul_rn(x, inverse_scale);
  return __float2int_rn(t == t ? fmaxf(fminf(t, 256.0f), -256.0f) : 0.0f) + zero_point;
}

// Eight elements at a time: two 16-byte accesses of float32, one of a half type; 8 bytes of codes; one byte of mask.
constexpr int kGroup = 8;

// Elements 0 .. count-1 of the group at p; the others are 0. `whole`: all eight are there and p is a multiple of 16.
template <class T>
__device__ __forceinline__ void load_group(const T* p, int count, bool whole, float (&x)[kGroup]) {
  constexpr int kVector = Vector16<T>::kCount;
  if (whole) {
#pragma unroll
    for (int i = 0; i < kGroup; i += kVector) {
      const uint4 raw = ptx::load16(p + i);
      Vector16<T> v;
      memcpy(&v, &raw, 16);
#pragma unroll
      for (int j = 0; j < kVector; ++j) x[i + j] = to_float(v.at[j]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) x[i] = i < count ? to_float(p[i]) : 0.0f;
}

template <class T>
__device__ __forceinline__ void store_group(T* p, int count, bool whole, const float (&x)[kGroup]) {
  constexpr int kVector = Vector16<T>::kCount;
  if (whole) {
#pragma unroll
    for (int i = 0; i < kGroup; i += kVector) {
      Vector16<T> v;
#pragma unroll
      for (int j = 0; j < kVector; ++j) v.at[j] = from_float<T>(x[i + j]);
      uint4 raw;
      memcpy(&raw, &v, 16);
      ptx::store16(p + i, raw);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (i < count) p[i] = from_float<T>(x[i]);
}

// Codes in the order of memory; `whole` here means a multiple of 8.
__device__ __forceinline__ void store_codes(int8_t* p, int count, bool whole, const int (&q)[kGroup]) {
  if (whole) {
    uint2 packed = make_uint2(0, 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      packed.x |= (static_cast<unsigned>(q[i]) & 0xffu) << (8 * i);
      packed.y |= (static_cast<unsigned>(q[4 + i]) & 0xffu) << (8 * i);
    }
    *reinterpret_cast<uint2*>(p) = packed;
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (i < count) p[i] = static_cast<int8_t>(q[i]);
}

__device__ __forceinline__ void load_codes(const int8_t* p, int count, bool whole, int (&q)[kGroup]) {
  if (whole) {
    const uint2 packed = *reinterpret_cast<const uint2*>(p);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      q[i] = static_cast<int8_t>(packed.x >> (8 * i));
      q[4 + i] = static_cast<int8_t>(packed.y >> (8 * i));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) q[i] = i < count ? p[i] : 0;
}

__device__ __forceinline__ int group_count(int64_t left) { return left < kGroup ? static_cast<int>(left) : kGroup; }

// The largest abs_bits that the calling thread, number `first` of `threads`, sees of a row.
template <class T>
__device__ __forceinline__ unsigned absmax_bits(const T* x, int64_t k, int first, int threads) {
  unsigned absmax = 0;
  const bool vectors = is_aligned(x, 16);
  for (int64_t i = static_cast<int64_t>(first) * kGroup; i < k; i += static_cast<int64_t>(threads) * kGroup) {
    const int count = group_count(k - i);
    float v[kGroup];
    load_group(x + i, count, vectors && count == kGroup, v);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) absmax = max(absmax, abs_bits(v[j]));
  }
  return absmax;
}

}  // namespace fs::qdq::sm80
