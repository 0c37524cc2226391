// What the kernels for float16 and bfloat16 weights share: x where cp.async can't copy it, and finished results from
// shared memory to y. Device code.
#pragma once
#include "../../runtime/cuda/device.h"

namespace fs::sparse_matmul::sm80 {

constexpr int kChunk = 8;  // elements of 16 bytes

// 16 bytes of shared memory from single elements. `left`: elements that there are.
__device__ __forceinline__ void copy_elements(unsigned char* target, const uint16_t* source, int left) {
  Vector16<uint16_t> v;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) v.at[i] = i < left ? source[i] : uint16_t{0};
  *reinterpret_cast<Vector16<uint16_t>*>(target) = v;
}

// Results of kRows x kColumns to y[m, n], where they begin at (row0, column0); chunk_at(row, chunk): where 16 bytes of
// them lie in shared memory.
template <class T, int kThreads, int kRows, int kColumns, class ChunkAt>
__device__ __forceinline__ void store_results(ChunkAt chunk_at, int64_t m, int64_t n, int64_t row0, int64_t column0,
                                              T* y) {
  const bool vectors = n % kChunk == 0 && is_aligned(y, 16);
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns / kChunk; i += kThreads) {
    const int r = i / (kColumns / kChunk), column = i % (kColumns / kChunk) * kChunk;
    if (row0 + r >= m) return;
    const int64_t left = n - column0 - column;
    const void* source = chunk_at(r, column / kChunk);
    T* target = y + (row0 + r) * n + column0 + column;
    if (vectors && left >= kChunk) {
      *reinterpret_cast<Vector16<T>*>(target) = *static_cast<const Vector16<T>*>(source);
    } else {
      const uint4 chunk = ptx::load16(source);  // whole results, whatever n is
      Vector16<T> values;
      memcpy(&values, &chunk, 16);
#pragma unroll
      for (int j = 0; j < kChunk; ++j)
        if (j < left) target[j] = values.at[j];
    }
  }
}

}  // namespace fs::sparse_matmul::sm80
