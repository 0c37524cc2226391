// CUDA's names for g++ -DFS_SIMT: what a .cu file of ours uses of CUDA, declared for the CPU stand-in that
// tests/cuda_on_cpu/ implements. Only what some kernel uses is here; add what yours needs. Included by device.h.
//
// Every call in which lanes or threads meet takes the caller's place as a last, defaulted argument, for the reports.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../simd/scalar.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// --- Types and built-in variables ------------------------------------------------------------------------------------
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;

extern uint3 threadIdx, blockIdx;  // of the thread that runs; the stand-in sets them at each switch
extern dim3 blockDim, gridDim;

struct __nv_bfloat16 {
  fs::bf16 value;
};
struct __half {
  fs::f16 value;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline float __bfloat162float(__nv_bfloat16 x) { return Simd::load(&x.value); }
inline float __half2float(__half x) { return Simd::load(&x.value); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 y;
  Simd::store(&y.value, x);
  return y;
}
inline __half __float2half_rn(float x) {
  __half y;
  Simd::store(&y.value, x);
  return y;
}

inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

// --- The stand-in ----------------------------------------------------------------------------------------------------
namespace fs::simt {

struct At {  // a place in a source
  const char* file;
  int line;
  static constexpr At here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Runs the kernel behind call(closure) for every thread of every block. Throws std::runtime_error with the report of
// the first finding.
void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*call)(void*), void* closure);

// This block's array behind `tag`, the same for all its threads, fresh and filled with 0xff.
void* shared_array(const void* tag, size_t bytes);
void* dynamic_shared();

// __syncthreads; returns how many threads passed a true predicate.
int barrier(const char* name, bool predicate, At at);

// An operation of the lanes in `mask`: the last of them to come runs it for all; arguments[lane] is null outside mask.
using WarpFunction = void (*)(unsigned mask, void* const* arguments);
void warp_operation(unsigned mask, const char* name, WarpFunction function, void* argument, At at);

enum class Shuffle { index, up, down, exclusive_or };
uint64_t shuffle(unsigned mask, Shuffle kind, uint64_t value, int operand, int width, At at);
unsigned ballot(unsigned mask, const char* name, bool predicate, At at);
enum class Reduce { add, minimum, maximum };
int64_t reduce(unsigned mask, Reduce kind, int64_t value, At at);

// An access that the compiler's instrumentation can't see as what it is. `bytes` bytes at p, naturally aligned.
void check_alignment(const void* p, size_t bytes, const char* what);
uint64_t atomic_read(const void* p, size_t bytes);
void atomic_write(void* p, size_t bytes, uint64_t bits);

// cp.async: the target was filled with 0xff, the payload read; it arrives in wait_async().
void issue_async(void* target, const void* payload, size_t bytes);
void commit_async();
void wait_async(int groups_left);

// The matrix instructions on one warp; operands in the layouts of ptx.h.
void ldmatrix(uint32_t* registers, int count, bool transposed, const void* row, const void* row_address, At at);
void mma_s8(int32_t* d, const uint32_t* a, const uint32_t* b, At at);
void mma_f16(float* d, const uint32_t* a, const uint32_t* b, At at);
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b, At at);
void mma_sp_f16(float* d, const uint32_t* a, const uint32_t* b, uint32_t metadata, int selector, At at);
void mma_sp_bf16(float* d, const uint32_t* a, const uint32_t* b, uint32_t metadata, int selector, At at);
void mma_sp_s8(int32_t* d, const uint32_t* a, const uint32_t* b, uint32_t metadata, At at);

template <class T>
inline uint64_t to_bits(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
inline T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace fs::simt

// --- Where threads and lanes meet ------------------------------------------------------------------------------------
#define FS_AT ::fs::simt::At at = ::fs::simt::At::here()

inline void __syncthreads(FS_AT) { fs::simt::barrier("__syncthreads", false, at); }
inline int __syncthreads_count(int predicate, FS_AT) {
  return fs::simt::barrier("__syncthreads_count", predicate != 0, at);
}
inline int __syncthreads_or(int predicate, FS_AT) {
  return fs::simt::barrier("__syncthreads_or", predicate != 0, at) > 0;
}
void __syncwarp(unsigned mask = 0xffffffffu, FS_AT);
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, FS_AT) {
  using namespace fs::simt;
  return from_bits<T>(shuffle(mask, Shuffle::index, to_bits(value), lane, width, at));
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, FS_AT) {
  using namespace fs::simt;
  return from_bits<T>(shuffle(mask, Shuffle::up, to_bits(value), delta, width, at));
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, FS_AT) {
  using namespace fs::simt;
  return from_bits<T>(shuffle(mask, Shuffle::down, to_bits(value), delta, width, at));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, FS_AT) {
  using namespace fs::simt;
  return from_bits<T>(shuffle(mask, Shuffle::exclusive_or, to_bits(value), lane_mask, width, at));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, FS_AT) {
  return fs::simt::ballot(mask, "__ballot_sync", predicate != 0, at);
}
inline int __any_sync(unsigned mask, int predicate, FS_AT) {
  return fs::simt::ballot(mask, "__any_sync", predicate != 0, at) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FS_AT) {
  return fs::simt::ballot(mask, "__all_sync", predicate != 0, at) == mask;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, FS_AT) {
  return static_cast<unsigned>(fs::simt::reduce(mask, fs::simt::Reduce::add, value, at));
}
inline int __reduce_add_sync(unsigned mask, int value, FS_AT) {
  return static_cast<int>(fs::simt::reduce(mask, fs::simt::Reduce::add, value, at));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, FS_AT) {
  return static_cast<unsigned>(fs::simt::reduce(mask, fs::simt::Reduce::maximum, value, at));
}
inline int __reduce_max_sync(unsigned mask, int value, FS_AT) {
  return static_cast<int>(fs::simt::reduce(mask, fs::simt::Reduce::maximum, value, at));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, FS_AT) {
  return static_cast<unsigned>(fs::simt::reduce(mask, fs::simt::Reduce::minimum, value, at));
}
inline int __reduce_min_sync(unsigned mask, int value, FS_AT) {
  return static_cast<int>(fs::simt::reduce(mask, fs::simt::Reduce::minimum, value, at));
}

// --- Atomics: threads run one at a time, so plain code is atomic; they return the old value
// ---------------------------
namespace fs::simt {
template <class T, class Next>
__forceinline__ T atomic_update(T* p, Next next) {
  const T old = from_bits<T>(atomic_read(p, sizeof(T)));
  atomic_write(p, sizeof(T), to_bits<T>(next(old)));
  return old;
}
}  // namespace fs::simt
#define FS_ATOMIC(name, type, expression)                                            \
  __forceinline__ type name(type* p, type value) {                                   \
    return fs::simt::atomic_update(p, [&](type old) -> type { return expression; }); \
  }
FS_ATOMIC(atomicAdd, int, old + value)
FS_ATOMIC(atomicAdd, unsigned, old + value)
FS_ATOMIC(atomicAdd, unsigned long long, old + value)
FS_ATOMIC(atomicAdd, float, old + value)
FS_ATOMIC(atomicMax, int, old > value ? old : value)
FS_ATOMIC(atomicMax, unsigned, old > value ? old : value)
FS_ATOMIC(atomicMin, int, old < value ? old : value)
FS_ATOMIC(atomicMin, unsigned, old < value ? old : value)
FS_ATOMIC(atomicOr, unsigned, old | value)
FS_ATOMIC(atomicAnd, unsigned, old& value)
FS_ATOMIC(atomicExch, int, (static_cast<void>(old), value))
FS_ATOMIC(atomicExch, unsigned, (static_cast<void>(old), value))
#undef FS_ATOMIC

// --- Arithmetic ------------------------------------------------------------------------------------------------------
#define FS_MIN_MAX(type)                                    \
  inline type min(type a, type b) { return a < b ? a : b; } \
  inline type max(type a, type b) { return a > b ? a : b; }
FS_MIN_MAX(int)
FS_MIN_MAX(unsigned)
FS_MIN_MAX(long)
FS_MIN_MAX(unsigned long)
FS_MIN_MAX(long long)
FS_MIN_MAX(unsigned long long)
#undef FS_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __expf(float x) { return expf(x); }  // the device's is less exact: tolerances must not rest on this
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __float2int_rn(float x) {  // saturates; NaN gives 0
  if (x != x) return 0;
  const float r = rintf(x);
  return r >= 2147483648.0f ? INT32_MAX : r < -2147483648.0f ? INT32_MIN : static_cast<int>(r);
}
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return bits_from_f32(x); }
inline int __float_as_int(float x) { return static_cast<int>(bits_from_f32(x)); }
inline float __uint_as_float(unsigned x) { return f32_from_bits(x); }
inline float __int_as_float(int x) { return f32_from_bits(static_cast<unsigned>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= ((x >> i) & 1u) << (31 - i);
  return y;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {  // without its sign mode
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned y = 0;
  for (int i = 0; i < 4; ++i) y |= static_cast<unsigned>(bytes >> (8 * ((selector >> (4 * i)) & 7)) & 0xff) << (8 * i);
  return y;
}
inline int __dp4a(int a, int b, int c) {
  uint32_t sum = static_cast<uint32_t>(c);
  for (int i = 0; i < 32; i += 8) {
    const auto x = static_cast<int8_t>(static_cast<uint32_t>(a) >> i);
    const auto y = static_cast<int8_t>(static_cast<uint32_t>(b) >> i);
    sum += static_cast<uint32_t>(x * y);
  }
  return static_cast<int>(sum);
}
template <class T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}
