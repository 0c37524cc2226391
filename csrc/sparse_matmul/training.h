// sparse_matmul, training: the three products of a weight whose zeros stay where they are while its values change.
// Torch-free. A *structure* (formats/structure.h) says where W[N,K] is not zero; values f32[nonzeros] lie beside it in
// the order of CSR (by row, then column), so that an optimiser, a checkpoint and a user see plain numbers.
//
//   product      y[M,N] = x[M,K] W^T, or with `transposed` y[M,K] = x[M,N] W    (bias and activation as in linear())
//   sample       values[i] = sum_m p[m, row of i] * q[m, column of i]            (sddmm: the gradient to the values)
//   activation_grad   out = grad * act'(z): what comes before the gradients of linear() and product(), which keep z (of
//                gelu and silu) or y (of relu) for it, so that nothing is computed twice
//
// Exactness. product: one chain of fused multiply-adds over ascending k (over ascending n where transposed) that starts
// at +0, as sparse_matmul.h says. sample: rows m are taken 64 at a time (the last up to 64: 16, 32 or 64, filled up
// with zeros). In such a panel lane l (0 to 15) is the chain over m = l, l + 16, ... that starts with a rounded product
// and goes on with fused multiply-adds; h[l] = ((lane l + lane l+2) + (lane l+1 + lane l+3)) for l = 0, 4, 8, 12; the
// panel's part is (h[0] + h[8]) + (h[4] + h[12]), and the parts are added up in ascending order. So the bits depend
// neither on the level nor on the number of threads.
//
// Memory: whatever bytes a structure holds behind its header, nothing outside the arguments is read or written: what
// sparse_matmul.h says of panels128 holds here; `start` and the labels are held below the number of values.
#pragma once
#include <stdint.h>

#include "../runtime/activation.h"

namespace fs::sparse_matmul {

struct Kernels;

// The tables of a structure that sample() walks; they have nothing to do with the blocks of panels128.
inline constexpr int64_t kSampleRows = 64;      // rows m of a panel
inline constexpr int64_t kSampleOutputs = 256;  // rows of W in a chunk
inline constexpr int64_t kSampleColumns = 128;  // columns of W in a block: 32 KB of a panel
inline constexpr int64_t kSampleRoom = 512;     // indices behind the last one that may be read

// One block (a chunk of kSampleOutputs rows of W, kSampleColumns columns) for one panel of m.
struct SampleArgs {
  const uint8_t* order;   // [2][kSampleOutputs]: rows, then their numbers of values, descending
  const uint32_t* start;  // [kSampleOutputs], by row in that order: the place of its first value
  const uint8_t* index;   // [nonzeros] by place: columns in the block; kSampleRoom more may be read
  int64_t nonzeros;
  const float* p;  // [kSampleOutputs][lanes]
  const float* q;  // [kSampleColumns][lanes]; another kSampleColumns rows may be read if the structure is damaged
  int64_t lanes;   // 16, 32 or 64
  bool add;        // to what values holds
  float* values;
};

// out[i] = grad[i] * act'(z[i]). Each operation is one float32 rounding, the same on every level:
// runtime/simd/math.inl.
struct ActivationGradArgs {
  const float* grad;
  const float* saved;     // relu: y, as z > 0 exactly where y > 0 (NaN: grad, as in torch); else z
  Activation activation;  // not none
  int64_t count;
  float* out;  // may be grad
};
void activation_grad(const Kernels& kernels, const ActivationGradArgs& args);

struct StructureView;  // formats/structure.h

struct ProductArgs {
  const StructureView* weight;
  const float* values;
  bool transposed;
  const float* x;  // [m, K], or [m, N] where transposed, rows x_stride elements apart
  int64_t x_stride;
  int64_t m;
  const float* bias;  // or null
  Activation activation;
  float* y;            // [m, N], or [m, K] where transposed, contiguous
  float* z = nullptr;  // as in LinearArgs
};
void product(const Kernels& kernels, const ProductArgs& args);

// A matrix [rows, columns] whose rows or columns lie together: one of the strides is 1.
struct Strided {
  const float* data;
  int64_t row_stride, column_stride;
};

struct SampleProductArgs {
  const StructureView* weight;
  Strided p;  // [m, N]
  Strided q;  // [m, K]
  int64_t m;
  float* values;  // [nonzeros]
};
void sample(const Kernels& kernels, const SampleProductArgs& args);

}  // namespace fs::sparse_matmul
