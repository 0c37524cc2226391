// weight_only_linear: the contract. Few rows of x times a weight of 8 or 4 bits: what counts is the weight's bytes.
//
//   y[M,N] = act(sum_g + bias), x in groups of G consecutive k of a row, w in groups of G consecutive k of a column:
//     x          codes and scale per row *and group*, by the rules of int8_linear's dynamic rows (int8_gemm.h):
//                x_scale[m,g] = max(absmax / 127, FLT_MIN), 1 for a group of zeros, NaN (and codes 0) for a group with
//                a NaN or an infinity, so that its whole row of y is NaN; x_q in [-127, 127]
//     w          u4 packs (formats/u4.h): G = 32, 64 or 128; code - zero_point, w_scale[n,g] float16
//                bitmap_u4 packs (formats/bitmap_u4.h): the same without its zeros, and the same bits
//                vnni16 packs (formats/vnni16.h): s8, G = 128, w_scale[n] float32, the same for all g
//     isum[g]    the exact integer sum of x_q * w over the group, |isum| <= 128 * 127 * 128 < 2^24
//     sum        0; then for g = 0, 1, ...: sum = fma(float(isum[g]), x_scale[m,g] * w_scale[n,g], sum)
//     y          act(sum + bias), without a bias act(sum); float32, and one rounding to y's type
//   Each operation is one float32 rounding, in this order, on every level: results are bit-equal. A row of x is rounded
//   to 8 bits beside its neighbours of 128 k at most: its error lies far below that of 4-bit, and below that of 8-bit
//   weights.
//
// Three steps: quantize (x to codes), tile_u4 or tile_s8 (sums), finish (sums to y). A bitmap has a tile of its own for
// few rows on VBMI2 (BitmapKernels); elsewhere its cells are made in scratch, 64 columns at a time, for tile_u4.
//
// An x panel holds `rows` rows, in blocks of kBlockK k, so that inside a tile a row's address is a constant
// displacement:
//   code (r,k) at (k / 128) * block_stride + r * 128 + k % 128, zero for K <= k < the next multiple of 128
//   scale, sum (r,g) at g * group_stride + r; sum is that of the group's codes
#pragma once
#include <stdint.h>

#include "../runtime/activation.h"
#include "../runtime/dtype.h"

namespace fs::int8_gemm {

inline constexpr int64_t kBlockK = 128;
inline constexpr int64_t kGroupS8 = 128;       // of a weight of 8 bits
inline constexpr int kWeightOnlyColumns = 64;  // of one tile at most; a multiple of 16

struct GroupQuantizeArgs {
  const void* x;  // [rows, k] of dtype, rows x_stride elements apart
  DType dtype;
  int64_t x_stride;
  int64_t rows, k;
  int64_t group;  // 32, 64 or 128
  int8_t* codes;
  int64_t block_stride;
  float* scale;
  int32_t* sum;
  int64_t group_stride;
};

// acc[r * kWeightOnlyColumns + j] = sum, for r < rows, j < columns.
struct GroupTileArgs {
  const int8_t* x;  // row 0 of the tile
  int64_t block_stride;
  const float* x_scale;
  const int32_t* x_sum;
  int64_t group_stride;
  int64_t rows;     // 1 .. max_rows
  int64_t columns;  // 16, 32, 48 or 64
  int64_t groups, group;
  int64_t k_steps;        // tile_s8: Kp / 4
  const uint8_t* weight;  // first column panel
  int64_t panel_stride;   // bytes between column panels
  const uint16_t* scale;  // tile_u4: f16, group 0 of the first column panel
  int64_t scale_stride;   // tile_u4: between column panels
  const uint8_t* zero;    // tile_u4: zero points of the same, or null: 8
  int64_t zero_stride;
  const float* scale_f32;  // tile_s8: [columns]
  float* acc;
  bool stream;             // tile_u4, one row: one column panel after the other, where a tile can
  int64_t prefetch_ahead;  // > 0: codes of weights are prefetched so many bytes ahead of their use
  int64_t prefetch_pages;  // > 0: in the place of that, where a tile can, the beginnings of pages so many pages ahead
};

// A bitmap_u4 pack, taken apart. Its bytes may be anything once header and size have passed: a position in the codes is
// held below the total at least once in four cells, behind which there is room for those.
struct BitmapU4 {
  int64_t n, k, group;
  int64_t total;           // bytes of codes
  const uint64_t* offset;  // [panels + 1], first byte of each column panel
  const uint64_t* mask;    // [panels][cells()][2]
  const uint16_t* scale;   // f16 [panels][groups()][16]
  const uint8_t* code;
  int64_t groups() const { return (k + group - 1) / group; }
  int64_t cells() const { return groups() * group / 8; }  // of 8 k in a panel of 16 columns
  int64_t begin(int64_t panel) const {
    return offset[panel] < static_cast<uint64_t>(total) ? static_cast<int64_t>(offset[panel]) : total;
  }
};

// What VBMI2 does with a bitmap.
struct BitmapKernels {
  int max_rows;                                                        // of tile
  void (*tile)(const GroupTileArgs&, const BitmapU4&, int64_t panel);  // in the place of tile_u4
  // The panel's cells as in u4, cells() * 64 bytes.
  void (*cells)(const BitmapU4&, int64_t panel, int64_t prefetch_ahead, uint8_t* out);
};
#if defined(__x86_64__)
extern const BitmapKernels kBitmapAvx512Vbmi2;  // cpu/weight_only_avx512vbmi2.cpp
#endif

struct FinishArgs {
  const float* acc;  // [rows][kWeightOnlyColumns]
  int64_t rows, columns;
  const float* bias;  // [columns] or null
  Activation activation;
  void* y;  // [rows, columns] of dtype, rows y_stride elements apart
  DType dtype;
  int64_t y_stride;
};

// A level's version of the steps; part of its Kernels row (int8_gemm.h).
struct WeightOnlyKernels {
  int max_rows;  // of one tile
  void (*quantize)(const GroupQuantizeArgs&);
  void (*tile_u4)(const GroupTileArgs&);
  void (*tile_s8)(const GroupTileArgs&);
  void (*finish)(const FinishArgs&);
};

// cpu/weight_only_launch.cpp
struct WeightOnlyArgs {
  const void* x;  // [m, k], rows x_stride elements apart
  DType dtype;    // of x and y
  int64_t x_stride;
  int64_t m, n, k;
  const uint8_t* weight;      // a u4 pack, or a vnni16 pack
  const float* weight_scale;  // [n] for a vnni16 pack, null for a u4 pack
  const float* bias;          // [n] or null
  Activation activation;
  void* y;                                        // [m, n], contiguous
  const BitmapU4* bitmap = nullptr;               // a bitmap_u4 pack in the place of weight and weight_scale
  const BitmapKernels* bitmap_kernels = nullptr;  // what the CPU has for one: null: nothing
};

struct Kernels;
void weight_only_linear(const Kernels& kernels, const WeightOnlyArgs& args);

}  // namespace fs::int8_gemm
