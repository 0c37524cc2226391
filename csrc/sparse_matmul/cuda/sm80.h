// sparse_matmul on CUDA, sm_80 and later: the launchers. Torch-free; pointers are device pointers, `stream` is a
// cudaStream_t.
#pragma once
#include <cstdint>

#include "../../runtime/dtype.h"
#include "../formats/bitmap16.h"
#include "../formats/blocks16.h"
#include "../formats/nm24.h"
#include "../formats/structure.h"
#include "../sparse_matmul.h"
#include "../training.h"
#include "header.h"

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
  HeaderIs header;
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

// Where W[n, k] is not zero. The values of row r are those numbered begin[r] .. end[r] - 1.
struct Csr {
  int64_t n, k, nonzeros;
  const int32_t *begin, *end;  // [n]; of an ordinary CSR end is begin + 1
  const int32_t* col;          // [nonzeros]
  const int32_t* place;        // [nonzeros], where a value lies among the values; null: at its number
};

// sm80_csr.cu: y[m, n] = act(x[m, k] W^T + bias), W = (weight, values), all float32; y contiguous. Of x either the rows
// or the columns lie together. scratch: that many floats, at a multiple of 16 bytes.
struct SpmmArgs {
  Csr weight;
  const float* values;
  Strided x;
  int64_t m;
  const float* bias;  // [n] or null
  Activation activation;
  float* y;
  HeaderIs header;
};
int64_t spmm_scratch_floats(const Csr& weight, int64_t m);
void spmm(const SpmmArgs& args, float* scratch, void* stream);

// The same file: grad[nonzeros], grad[i] = sum over m of dy[m, row of i] * x[m, column of i]. weight.place is null.
struct SddmmArgs {
  Csr weight;
  Strided dy, x;  // [m, n] and [m, k]
  int64_t m;
  float* grad;
  HeaderIs header;
};
int64_t sddmm_scratch_floats(const Csr& weight, int64_t m);
void sddmm(const SddmmArgs& args, float* scratch, void* stream);

// sm80_structure.cu: the products of training.h from a structure on the device, of which the tables are read and not
// the packs. scratch: that many bytes, at a multiple of 16.
struct StructureProduct {
  const StructureView* weight;
  bool transposed;
  const float* values;
  Strided x;  // [m, K], or [m, N] where transposed
  int64_t m;
  const float* bias;  // or null
  Activation activation;
  float* y;  // [m, N], or [m, K] where transposed, contiguous
  HeaderIs header;
};
int64_t product_scratch_bytes(const StructureView& weight, bool transposed, int64_t m);
void product(const StructureProduct& args, void* scratch, void* stream);

int64_t sample_scratch_bytes(const StructureView& weight, int64_t m);
void sample(const SampleProductArgs& args, const HeaderIs& header, void* scratch, void* stream);

}  // namespace fs::sparse_matmul::sm80
