// qdq, CUDA sm_80: rows to codes with a scale each; elementwise quantize, dequantize, fake_quantize and its gradient.
// Idea     memory-bound: 16-byte accesses, every element read from DRAM once.
// Work     quantize_per_token: a warp a row up to kWarpRow elements (shuffles alone), a block a row beyond (shuffles,
//          then one word a warp through shared memory); the second pass over the row finds it in L1 or L2.
//          Elementwise: eight elements a thread, never across a row, so that a byte of the mask has one writer.
// Tails    the last group of a row, and every group of a row that is not at a multiple of 16 bytes: one by one.
// Exact    the arithmetic of cpu/rows.inl, each operation rounded by itself (__fmul_rn: nvcc would contract).
// Measured never run on hardware.
#include "sm80.h"

#include "../../runtime/cuda/device.h"
#include "rows.h"

namespace fs::qdq::sm80 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kWarpRow = 2048;     // 8 groups a lane
constexpr int64_t kMaxBlocks = 65535;  // more work than that: each block takes several shares

// --- quantize_per_token ----------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void write_codes(const T* x, int8_t* codes, int64_t k, float scale, int first, int threads) {
  const bool finite = scale == scale;
  const float inverse = __fdiv_rn(1.0f, scale);
  const bool x_vectors = is_aligned(x, 16), code_vectors = is_aligned(codes, kGroup);
  for (int64_t i = static_cast<int64_t>(first) * kGroup; i < k; i += static_cast<int64_t>(threads) * kGroup) {
    const int count = group_count(k - i);
    float v[kGroup];
    int q[kGroup];
    load_group(x + i, count, x_vectors && count == kGroup, v);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) q[j] = finite ? dynamic_code(v[j], inverse) : 0;
    store_codes(codes + i, count, code_vectors && count == kGroup, q);
  }
}

// Warp w of block b takes row b * kWarps + w, and so on in steps of the grid.
template <class T>
__global__ void __launch_bounds__(kThreads)
    token_by_warp(const T* x, int64_t x_stride, int64_t rows, int64_t k, int8_t* codes, float* scales) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; row < rows;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    const float scale = row_scale(max_of_warp(absmax_bits(x + row * x_stride, k, lane, 32)));
    write_codes(x + row * x_stride, codes + row * k, k, scale, lane, 32);
    if (lane == 0) scales[row] = scale;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    token_by_block(const T* x, int64_t x_stride, int64_t rows, int64_t k, int8_t* codes, float* scales) {
  FS_SHARED(unsigned, warp_max, [kWarps]);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    unsigned absmax = max_of_warp(absmax_bits(x + row * x_stride, k, thread, kThreads));
    if (thread % 32 == 0) warp_max[thread / 32] = absmax;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) absmax = max(absmax, warp_max[w]);
    __syncthreads();  // the next row overwrites warp_max
    const float scale = row_scale(absmax);
    write_codes(x + row * x_stride, codes + row * k, k, scale, thread, kThreads);
    if (thread == 0) scales[row] = scale;
  }
}

template <class T>
void token_as(const TokenArgs& a, cudaStream_t stream) {
  const bool by_warp = a.k <= kWarpRow;
  const int64_t blocks = by_warp ? (a.rows + kWarps - 1) / kWarps : a.rows;
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  launch({grid, dim3(kThreads), 0, stream}, by_warp ? token_by_warp<T> : token_by_block<T>, static_cast<const T*>(a.x),
         a.x_stride, a.rows, a.k, a.codes, a.scale);
}

// --- Elementwise -----------------------------------------------------------------------------------------------------

// What the elements of a tensor [rows, length] belong to (rows_of() in ../qdq.h).
struct Layout {
  int64_t rows, length, groups;  // groups of a row
  bool varying;                  // element i of every row takes entry i / inner; else row r takes entry r % channels
  int64_t channels, inner;
  const float* scale;
  const int32_t* zero_point;  // or null
};

struct Entry {
  float scale, inverse;
  int zero_point;
};

__device__ __forceinline__ Entry entry_at(const Layout& l, int64_t channel) {
  const float scale = l.scale[channel];
  return {scale, __fdiv_rn(1.0f, scale), l.zero_point == nullptr ? 0 : l.zero_point[channel]};
}

// The entries of the elements of a group, looked up where the channel changes.
struct Entries {
  const Layout& l;
  int64_t channel, left;  // elements until the channel changes
  Entry now;
  __device__ __forceinline__ Entries(const Layout& l, int64_t row, int64_t i)
      : l(l), channel(l.varying ? i / l.inner : row % l.channels), left(l.varying ? l.inner - i % l.inner : kGroup) {
    now = entry_at(l, channel);
  }
  __device__ __forceinline__ void next() {  // once after each element, but the last of a row
    if (--left > 0) return;
    if (l.varying && channel + 1 < l.channels) now = entry_at(l, ++channel);
    left = l.varying ? l.inner : kGroup;
  }
};

// Calls body(row, i, count) for each group: its row, its first element there, how many there are.
template <class Body>
__device__ __forceinline__ void for_groups(const Layout& l, const Body& body) {
  const int64_t all = l.rows * l.groups;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; g < all;
       g += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = g / l.groups, i = g % l.groups * kGroup;
    body(row, i, group_count(l.length - i));
  }
}

template <class T>
__device__ __forceinline__ bool whole(const T* p, int count, unsigned bytes) {
  return count == kGroup && is_aligned(p, bytes);
}

__device__ __forceinline__ int clamp(int q, int lowest, int highest) { return max(lowest, min(highest, q)); }

__device__ __forceinline__ float value_of(int q, const Entry& e) {
  return __fmul_rn(static_cast<float>(q - e.zero_point), e.scale);
}

template <class T>
__global__ void __launch_bounds__(kThreads) quantize_all(const T* x, int8_t* codes, Layout l) {
  for_groups(l, [&](int64_t row, int64_t i, int count) {
    const int64_t at = row * l.length + i;
    Entries entries(l, row, i);
    float v[kGroup];
    int q[kGroup];
    load_group(x + at, count, whole(x + at, count, 16), v);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      q[j] = clamp(static_code(v[j], entries.now.inverse, entries.now.zero_point), -128, 127);
      entries.next();
    }
    store_codes(codes + at, count, whole(codes + at, count, kGroup), q);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_all(const int8_t* codes, T* y, Layout l) {
  for_groups(l, [&](int64_t row, int64_t i, int count) {
    const int64_t at = row * l.length + i;
    Entries entries(l, row, i);
    int q[kGroup];
    float v[kGroup];
    load_codes(codes + at, count, whole(codes + at, count, kGroup), q);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      v[j] = value_of(q[j], entries.now);
      entries.next();
    }
    store_group(y + at, count, whole(y + at, count, 16), v);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    fake_quantize_all(const T* x, T* y, uint8_t* mask, int lowest, int highest, Layout l) {
  for_groups(l, [&](int64_t row, int64_t i, int count) {
    const int64_t at = row * l.length + i;
    Entries entries(l, row, i);
    float v[kGroup];
    unsigned inside = 0;
    load_group(x + at, count, whole(x + at, count, 16), v);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int q = static_code(v[j], entries.now.inverse, entries.now.zero_point);
      const int code = clamp(q, lowest, highest);
      if (j < count && q == code && v[j] == v[j]) inside |= 1u << j;
      v[j] = value_of(code, entries.now);
      entries.next();
    }
    store_group(y + at, count, whole(y + at, count, 16), v);
    if (mask != nullptr) mask[row * l.groups + i / kGroup] = static_cast<uint8_t>(inside);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    fake_quantize_grad_all(const T* grad, const uint8_t* mask, T* grad_x, Layout l) {
  for_groups(l, [&](int64_t row, int64_t i, int count) {
    const int64_t at = row * l.length + i;
    const unsigned inside = mask[row * l.groups + i / kGroup];
    float v[kGroup];
    load_group(grad + at, count, whole(grad + at, count, 16), v);
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (!(inside >> j & 1)) v[j] = 0.0f;
    store_group(grad_x + at, count, whole(grad_x + at, count, 16), v);
  });
}

Layout layout_of(const Parameters& p) {
  const Rows r = rows_of(p.shape);
  return {r.rows, r.length, mask_bytes(r.length), r.varying, p.shape.channels, p.shape.inner, p.scale, p.zero_point};
}

template <class... Parameters, class... Args>
void launch_groups(const Layout& l, void* stream, void (*kernel)(Parameters...), Args... args) {
  const int64_t blocks = (l.rows * l.groups + kThreads - 1) / kThreads;
  if (blocks == 0) return;
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  launch({grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream)}, kernel, args..., l);
}

// Calls body(a null pointer to the element type).
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(static_cast<float*>(nullptr));
    case DType::bf16: return body(static_cast<__nv_bfloat16*>(nullptr));
    case DType::f16: return body(static_cast<__half*>(nullptr));
  }
}

}  // namespace

void quantize_per_token(const TokenArgs& args, void* stream) {
  if (args.rows == 0) return;
  auto* s = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::f32: return token_as<float>(args, s);
    case DType::bf16: return token_as<__nv_bfloat16>(args, s);
    case DType::f16: return token_as<__half>(args, s);
  }
}

void quantize(const void* x, DType dtype, const Parameters& p, int8_t* codes, void* stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_groups(layout_of(p), stream, quantize_all<T>, static_cast<const T*>(x), codes);
  });
}

void dequantize(const int8_t* codes, const Parameters& p, void* y, DType dtype, void* stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_groups(layout_of(p), stream, dequantize_all<T>, codes, static_cast<T*>(y));
  });
}

void fake_quantize(const void* x, DType dtype, const Parameters& p, int32_t lowest, int32_t highest, void* y,
                   uint8_t* mask, void* stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_groups(layout_of(p), stream, fake_quantize_all<T>, static_cast<const T*>(x), static_cast<T*>(y), mask,
                  lowest, highest);
  });
}

void fake_quantize_grad(const void* grad, DType dtype, int64_t rows, int64_t length, const uint8_t* mask, void* grad_x,
                        void* stream) {
  const Layout l{rows, length, mask_bytes(length), false, 1, 1, nullptr, nullptr};
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_groups(l, stream, fake_quantize_grad_all<T>, static_cast<const T*>(grad), mask, static_cast<T*>(grad_x));
  });
}

}  // namespace fs::qdq::sm80
