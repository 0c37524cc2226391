// int8_gemm: the contract of every kernel of the family. Read this first. Torch-free.
//
//   int8_mm      C[M,N] s32 = A[M,K] s8 * B[K,N] s8                       exact: |C| < 2^31 while K <= 131071
//   int8_linear  y[M,N] = act(x_q W^T * x_scale * weight_scale + bias + residual)    x_q from x[M,K] in three ways:
//     dynamic    x_scale[m] = max(absmax_k |x[m,k]| / 127, FLT_MIN), 1 for a row of zeros, NaN for a row with a
//                NaN or an infinity; x_q = round_half_even(x * (1 / x_scale)), in [-127, 127]
//     static     x_q = clamp(round_half_even(x * (1 / x_scale)) + zero_point, -128, 127), NaN -> zero_point;
//                the integer sum is over (x_q - zero_point), so K <= 65793
//     codes      x is s8: x_q = x, with one x_scale for all rows, or x_scale[m], taken as they are (a NaN makes its row
//                NaN); the sum is over (x_q - zero_point), as static
//   and y computed in float32 as
//     t = fma(float(sum), x_scale * weight_scale, bias)    without a bias -0.0 in its place, which changes nothing
//     t = t + residual                                     residual[M,N] of y's float type; none: no addition
//     y = act(t)
//   and then either one rounding to y's float type, or, with y_scale, requantized to s8 from the float32 value:
//     y_q = clamp(round_half_even(y * (1 / y_scale)) + y_zero_point, -128, 127), NaN -> y_zero_point, infinities
//           saturate: the codes of qdq's static quantize (qdq/qdq.h); 1 / y_scale is one float32 division.
//   So a layer's codes with (y_scale, y_zero_point) are the next layer's codes with (x_scale, x_zero_point).
//
//   weight_only_linear  weights of 8 or 4 bits for few rows: its contract is weight_only.h
//
// The work is cut into four steps; a Kernels row holds one ISA level's version of each:
//
//   x --quantize--> A panel --tile--> acc s32[rows][columns] --epilogue--> y
//   a s8 ---widen--^
//
// A *panel* is a chunk of rows of x as the tile wants to read them: u8 = s8 + 128 or s16, in blocks of
// kBlockBytes of each row, so that inside a tile a row's address is a constant displacement:
//   element (r, k) at block_stride * (k / block) + kRowStride * r + panel_bytes * (k % block),
//   block = kBlockBytes / panel_bytes; K is padded to a multiple of 4 (the pad meets weights that are zero).
// A *column panel* is 16 columns of the packed weight (formats/vnni16.h).
// A *tile* is at most max_rows x max_columns sums, all held in registers over the whole of K.
//
// Exactness: quantize, widen and tile give the same integers on every level, epilogue the same bits: each rounds
// where this header says and nowhere else. Nothing is read or written outside the stated ranges.
#pragma once
#include <stdint.h>

#include "../runtime/activation.h"
#include "../runtime/dtype.h"
#include "../runtime/features.h"
#include "weight_only.h"

namespace fs::int8_gemm {

using fs::Activation;  // runtime/activation.h
using fs::DType;

inline constexpr int kPanelColumns = 16;      // columns of one packed weight panel
inline constexpr int kStepK = 4;              // k of one step of a tile
inline constexpr int64_t kBlockBytes = 1024;  // bytes of one row in one block of an A panel
inline constexpr int64_t kRowStride = 1088;   // + 64: rows of a block fall into different L1 sets
inline constexpr int kMaxTileRows = 32;
inline constexpr int kMaxTileColumns = 64;

inline constexpr int64_t kMaxK = 131071;       // 128 * 128 * K < 2^31
inline constexpr int64_t kMaxKAffine = 65793;  // 255 * 128 * K < 2^31

struct QuantizeArgs {
  const void* x;  // [rows, k] of dtype, rows x_stride elements apart
  DType dtype;
  int64_t x_stride;
  int64_t rows, k;
  uint8_t* panel;
  int64_t block_stride;  // bytes between the blocks of a panel
  bool dynamic;
  float static_scale;         // dynamic false: finite, > 0
  int32_t static_zero_point;  // dynamic false: in [-128, 127]
  float* scale;               // [rows], written
};

struct WidenArgs {
  const int8_t* a;  // [rows, k], rows a_stride elements apart
  int64_t a_stride;
  int64_t rows, k;
  uint8_t* panel;
  int64_t block_stride;
};

// Whole cells of vnni16 (formats/vnni16.h) from a B that comes unpacked, [k, columns] with element (i, j) at
// i * stride_k + j * stride_n, one of the strides being 1.
struct PackArgs {
  const int8_t* b;
  int64_t stride_k, stride_n;
  int64_t k, columns;    // multiples of 4 and 16
  int8_t* cells;         // of the first panel; written
  int64_t panel_stride;  // bytes between panels
  int32_t* column_sum;   // [columns]: added to
};

// acc[r * acc_stride + j] = -offset * column_sum[j] + sum_k A(r, k) * W(j, k), for r < rows, j < columns.
// With offset = panel_offset + zero_point this is the sum over (x_q - zero_point): the compensation costs nothing.
struct TileArgs {
  const uint8_t* panel;  // row 0 of the tile, block 0
  int64_t block_stride;
  int64_t rows;           // 1 .. max_rows; the panel has row_step * ceil(rows / row_step)
  const int8_t* weight;   // first column panel
  const int8_t* widened;  // what widen_weights() made of it, or null
  int64_t panel_stride;   // bytes between column panels: 16 * Kp
  int64_t columns;        // a multiple of 16, at most columns_for(rows); any of one row if whole_row
  const int32_t* column_sum;
  int32_t offset;
  const int32_t* start;  // [columns], as enter() wrote it
  int64_t k_steps;       // Kp / 4
  int32_t* acc;
  int64_t acc_stride;      // elements; kMaxTileColumns, or any where strided_sums says so
  bool in_l2;              // the whole weight fits L2
  bool stream;             // one or two rows: one column panel after the other, where a tile can
  bool shuffle;            // one row as a stream: x by shuffles in place of loads, where a tile can
  int64_t prefetch_ahead;  // > 0: weights are prefetched so many bytes ahead of their use (few rows, from L3 or DRAM)
  int64_t prefetch_pages;  // > 0: in the place of that, the beginnings of pages so many pages ahead (one or two rows)
  const int8_t* prefetch_next;  // not null: prefetch_bytes from here go to L2 meanwhile (many rows: the next panel)
  int64_t prefetch_bytes;
  const char* y;     // not null: where row 0 of the result goes; many rows bring its lines meanwhile, to be written
  int64_t y_stride;  // bytes
  bool y_late;       // after three quarters of the tile's first block, not at once
};

struct EpilogueArgs {
  const int32_t* acc;  // [rows][kMaxTileColumns]
  int64_t rows, columns;
  const float* x_scale;       // [rows]
  const float* weight_scale;  // [columns]
  const float* bias;          // [columns] or null
  const void* residual;       // [rows, columns] of dtype, rows residual_stride elements apart, or null
  int64_t residual_stride;
  Activation activation;
  void* y;      // [rows, columns] of dtype, or of s8 if requantize; rows y_stride elements apart
  DType dtype;  // of a float y, and of the residual in any case
  int64_t y_stride;
  bool requantize;
  float y_scale;         // requantize: finite, >= FLT_MIN
  int32_t y_zero_point;  // requantize: in [-128, 127]
};

struct Kernels {
  const char* name;
  isa::Level level;
  uint32_t features;
  int panel_bytes;   // bytes of one element of an A panel
  int panel_offset;  // what an element is more than x_q: 128 (u8) or 0 (s16)
  int max_rows;      // of one tile
  int row_step;      // tiles read rows of the panel by so many: what is left of a step is scratch without meaning
  int few_rows;      // tiles of at most so many rows are few_columns wide, taller ones many_columns
  int few_columns, many_columns;
  void (*quantize)(const QuantizeArgs&);
  void (*widen)(const WidenArgs&);
  void (*tile)(const TileArgs&);
  void (*epilogue)(const EpilogueArgs&);
  void (*pack)(const PackArgs&);  // null: no faster than plain loops
  // Before and after the tiles of a chunk, on the thread that runs them; null: nothing to do. enter() may write what
  // the sums of n columns start from, long before a tile reads it.
  void (*enter)(const int32_t* column_sum, int64_t n, int32_t offset, int32_t* start);
  void (*leave)();
  // A column panel of k_steps as the tile reads it fastest, twice as large: worth it where many tiles share it. Null:
  // nothing is faster than the panel itself.
  void (*widen_weights)(const int8_t* panel, int64_t k_steps, int8_t* out);
  const WeightOnlyKernels* weight_only;  // weight_only_linear: weight_only.h
  // tile() and epilogue() in one, to the same bits, the sums never leaving the registers. False: nothing was done, this
  // tile or this epilogue is none of those that it knows. Null: it knows none.
  bool (*tile_to_y)(const TileArgs&, const EpilogueArgs&);
  bool whole_row = false;     // a tile of one row takes any number of columns at once
  bool strided_sums = false;  // tiles of more than few_rows write rows of acc as far apart as acc_stride says
};

// One per ISA file (cpu/<level>.cpp).
extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvxVnni;
extern const Kernels kAvx512;
extern const Kernels kAmx;
#endif

// cpu/launch.cpp: blocking, threads, scratch. `kernels` is what select() chose before work is split.
struct LinearArgs {
  const void* x;  // [m, k] of dtype, or of s8 if x_codes; rows x_stride elements apart
  bool x_codes;
  DType dtype;  // of a float x
  int64_t x_stride;
  int64_t m, n, k;
  const uint8_t* weight;      // a vnni16 pack
  const float* weight_scale;  // [n]
  const float* bias;          // [n] or null
  Activation activation;
  bool dynamic;  // of a float x alone
  float x_scale;
  int32_t x_zero_point;   // of no meaning if dynamic
  const float* x_scales;  // x_codes: [m], in the place of x_scale, or null
  const void* residual;   // [m, n] of y_dtype, rows residual_stride elements apart, or null
  int64_t residual_stride;
  DType y_dtype;  // of a float y, and of the residual in any case
  bool requantize;
  float y_scale;
  int32_t y_zero_point;
  void* y;  // [m, n] of y_dtype, or of s8 if requantize; contiguous
};

struct MatmulArgs {
  const int8_t* a;  // [m, k], rows a_stride elements apart
  int64_t a_stride;
  const int8_t* b;  // [k, n], element (k, n) at k * b_stride_k + n * b_stride_n
  int64_t b_stride_k, b_stride_n;
  int64_t m, n, k;
  int32_t* c;  // [m, n], contiguous
};

void linear(const Kernels& kernels, const LinearArgs& args);
void matmul(const Kernels& kernels, const MatmulArgs& args);

}  // namespace fs::int8_gemm
