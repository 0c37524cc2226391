// Whether the bytes of a pack say what its launcher was told (header.h). Device code.
#pragma once
#include "../../runtime/cuda/device.h"
#include "header.h"

namespace fs::sparse_matmul::sm80 {

__device__ __forceinline__ bool holds(const HeaderIs& is) {
  bool same = true;
#pragma unroll
  for (int i = 0; i < HeaderIs::kNonzeros; ++i)
    if (i < is.count) same = same && is.there[i] == is.words[i];
  return same;
}

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

}  // namespace fs::sparse_matmul::sm80
