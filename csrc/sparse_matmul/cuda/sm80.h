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

// Where W[n, k] is not zero, in the order of its rows.
struct Csr {
  int64_t n, k, nonzeros;
  const void* crow;  // [n + 1], int64_t if wide_crow, else int32_t: the first value of each row, and nonzeros at last
  bool wide_crow;
  const int32_t* col;  // [nonzeros]
};

// sm80_csr.cu: y[m, n] = x[m, k] W^T, W = (weight, values), all float32; rows of x x_stride elements apart, y
// contiguous. scratch: that many floats, at a multiple of 16 bytes.
int64_t spmm_scratch_floats(const Csr& weight, int64_t m);
void spmm(const Csr& weight, const float* values, const float* x, int64_t x_stride, int64_t m, float* y, float* scratch,
          void* stream);

// The same file: grad[nonzeros], grad[i] = sum over m of dy[m, row of i] * x[m, column of i].
int64_t sddmm_scratch_floats(const Csr& weight, int64_t m);
void sddmm(const Csr& weight, const float* dy, int64_t dy_stride, const float* x, int64_t x_stride, int64_t m,
           float* grad, float* scratch, void* stream);

}  // namespace fs::sparse_matmul::sm80
