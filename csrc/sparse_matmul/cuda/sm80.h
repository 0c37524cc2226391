// sparse_matmul on CUDA, sm_80 and later: the launchers. Torch-free; pointers are device pointers, `stream` is a
// cudaStream_t.
#pragma once
#include <cstdint>

#include "../../runtime/dtype.h"
#include "../formats/bitmap16.h"
#include "../formats/blocks16.h"
#include "../formats/nm24.h"
#include "../sparse_matmul.h"

namespace fs::sparse_matmul::sm80 {

inline constexpr const char* kName = "sm80";
// No hardware has run these kernels yet: they are off unless FASTSPARSE_UNPROVEN=1 (docs/gpu-status.md).
inline constexpr bool kProven = false;

// x and what becomes of the sums: y = act(sum + bias), in x's dtype.
struct Rows {
  const void* x;  // [m, k], rows x_stride elements apart
  DType dtype;
  int64_t x_stride;
  int64_t m;
  const float* bias;  // [n] or null
  Activation activation;
  void* y;  // [m, n], contiguous
};

// sm80_few_rows.cu: a bitmap32 pack, made for m up to 16; more rows go through 16 at a time, each pass reading the
// weight.
void linear_bitmap32(const Pack& weight, const Rows& rows, void* stream);

// sm80_bitmap16.cu: the same of 16-bit values, x and y of the weight's dtype.
void linear_bitmap16(const bitmap16::Weight& weight, const Rows& rows, void* stream);

// sm80_mma_sp.cu: an nm24 pack, x and y of the weight's dtype, any number of rows.
void linear_nm24(const nm24::Weight& weight, const Rows& rows, void* stream);

// sm80_blocks.cu: a blocks16 pack, x and y of the weight's dtype, any number of rows.
void linear_blocks16(const blocks16::Weight& weight, const Rows& rows, void* stream);

}  // namespace fs::sparse_matmul::sm80
