// sparse_int8_linear: the contract of its kernels, beside that of the family (sparse_matmul.h). Torch-free.
//
//   y[M,N] = act(x_q W^T * x_scale * weight_scale + bias)     W s8[N,K], mostly zeros
//
// x_q, x_scale and y as in int8_linear, dynamic (int8_gemm/int8_gemm.h): its quantize and its epilogue run here, and
// the sums between them are exact integers. So the bits of y are those of int8_linear on the dense weight, whatever the
// format, the level, the number of threads and of rows.
//
//   bitmap_s8   few rows: x as a row of codes; a tile of 16 outputs x 4 k is expanded in registers
//   windows_s8  zeros anywhere, few rows from caches or many: rows of codes, 64 of them in a register, of which each
//               weight picks its own
//   blocks_s8   zeros in blocks, many rows: x as a panel, 4 k of up to 64 rows side by side, against one weight block
//
// What a code is depends on the level (Kernels::dense): u8 = x_q + 128, or x_q itself as s16 or s8; sums start at
// -offset * sum_k W(n, k), which turns the one into the other.
//
// Memory: a pack's bytes may be anything once header and size have passed (view). Positions in the values are held
// below the total, behind which there is room for what one step may read; an index is a u8 into a panel that goes on
// for 256 groups, a window a u16 into a row of codes that goes on for 65536 groups; outputs are u8 inside a padded
// chunk. Damaged bytes give wrong numbers and never an access outside.
#pragma once
#include <stdint.h>

#include "../int8_gemm/int8_gemm.h"
#include "sparse_matmul.h"

namespace fs::sparse_matmul::int8 {

inline constexpr int64_t kTileOutputs = 16;  // of a bitmap_s8 tile
inline constexpr int64_t kTileK = 4;         // of a bitmap_s8 tile and of a block
inline constexpr int64_t kClampTiles = 4;    // tiles between two looks at the position in the values
inline constexpr int64_t kRoom = 512;        // bytes behind the values: more than kClampTiles tiles, and a load

inline constexpr int64_t kOutputs = 256;  // of a blocks_s8 chunk
inline constexpr int64_t kGroups = 128;   // of 4 k, in one block of k: 32 KB of x for 64 rows
inline constexpr int64_t kBlockRows[] = {1, 4};

inline constexpr int64_t kWindow = 64;         // codes of x that a step of windows_s8 looks at
inline constexpr int64_t kWindowOutputs = 32;  // outputs of its slices
inline constexpr int64_t kSlots = 4;           // weights of an output in a step
inline constexpr int64_t kStepBytes = 2 * kWindowOutputs * kSlots;
inline constexpr int64_t kWindowReach = 65536 * kTileK + 256;  // codes: beyond any window, and any u8 index in it

using int8_gemm::kMaxK;

// A pack, taken apart. sum: of the weights of each output, of the padding 0.
struct Bitmap {
  int64_t n, k;
  int64_t total;           // values
  const uint64_t* offset;  // [panels + 1], first value of each panel of 16 outputs
  const uint64_t* mask;    // [panels][ceil(k / 4)]
  const int8_t* value;
  const int32_t* sum;  // [16 * panels]
  int64_t steps() const { return (k + kTileK - 1) / kTileK; }
  int64_t panels() const { return (n + kTileOutputs - 1) / kTileOutputs; }
};

struct Blocks {
  int64_t n, k;
  int64_t rows;            // outputs of a block: 1 or 4
  int64_t total;           // blocks
  const uint64_t* offset;  // [chunks + 1], first block of each chunk of kOutputs
  const uint8_t* order;    // [chunks][blocks of k][2][units]: units, then their counts, descending
  const uint8_t* index;    // [total], group in the block of k
  const int8_t* value;     // [total][rows][4]
  const int32_t* sum;      // [kOutputs * chunks]
  int64_t units() const { return kOutputs / rows; }
  int64_t groups() const { return (k + kTileK - 1) / kTileK; }
  int64_t k_blocks() const { return (groups() + kGroups - 1) / kGroups; }
  int64_t chunks() const { return (n + kOutputs - 1) / kOutputs; }
};

struct Windows {
  int64_t n, k;
  int64_t total;           // steps
  const uint64_t* offset;  // [slices + 1], first step of each slice of kWindowOutputs
  const uint16_t* base;    // [total], k / 4 of the window
  const uint8_t* step;     // [total][2][kWindowOutputs][kSlots]: u8 index in the window, s8 value
  const int32_t* sum;      // [kWindowOutputs * slices]
  int64_t slices() const { return (n + kWindowOutputs - 1) / kWindowOutputs; }
  // Steps of a slice, within the pack whatever offset says.
  int64_t begin(int64_t slice) const { return at_most_total(offset[slice]); }
  int64_t end(int64_t slice) const { return at_most_total(offset[slice + 1]); }
  int64_t at_most_total(uint64_t step) const {
    return step < static_cast<uint64_t>(total) ? static_cast<int64_t>(step) : total;
  }
};

// acc[r * kMaxTileColumns + 16 * p + j] = sum of output 16 * (panel + p) + j for row r
struct FewArgs {
  Bitmap weight;
  const uint8_t* x;  // codes [rows][4 * steps()], rows x_stride bytes apart
  int64_t x_stride;
  int64_t rows;  // 1 .. Kernels::few_rows
  int64_t panel, panels;
  int32_t offset;
  int64_t prefetch_ahead;  // bytes of values, 0: the pack lies in L2
  int32_t* acc;
};

// acc[r * kMaxTileColumns + kWindowOutputs * s + j] = sum of output kWindowOutputs * (slice + s) + j for row r
struct WindowArgs {
  Windows weight;
  const uint8_t* x;  // codes of `rows` rows, x_stride bytes apart; kWindowReach of them may be read from each row on
  int64_t x_stride;
  int64_t rows;  // 1 .. kWindowRows
  int64_t slice, slices;
  int32_t offset;
  int32_t* acc;
};
inline constexpr int64_t kWindowRows = 8;

// sums[output in chunk][lanes] of one chunk for one panel of x.
struct PanelArgs {
  Blocks weight;
  const uint8_t* panel;  // [groups][dwords of 4 codes][lanes][4 bytes]; kGroups more may be read if the pack is damaged
  int64_t lanes;         // 1, 2 or 4 times Kernels::width
  int64_t chunk;
  int32_t offset;
  int32_t* sums;  // [kOutputs][lanes]; outputs beyond N have no meaning
};

// y[r][c] = act(sums[c][r] * x_scale[r] * weight_scale[c] + bias[c]), float32, to the bits of int8_gemm's epilogue
struct ColumnsArgs {
  const int32_t* sums;  // as in PanelArgs; whole tiles of 16 x 16 are read
  int64_t lanes;
  int64_t rows, columns;
  const float* x_scale;       // [rows]
  const float* weight_scale;  // [columns]
  const float* bias;          // [columns] or null
  Activation activation;
  float* y;
  int64_t y_stride;
};

enum class Layout { bitmap, windows, blocks };

struct Kernels {
  const char* name;
  isa::Level level;
  uint32_t features;
  const int8_gemm::Kernels* dense;      // quantize, epilogue, panel_bytes, panel_offset
  const sparse_matmul::Kernels* moves;  // transpose
  int few_rows;                         // rows of x that one pass over a bitmap serves
  int width;                            // rows of x in one vector of a panel
  void (*bitmap)(const FewArgs&);
  void (*windows)(const WindowArgs&);
  void (*blocks)(const PanelArgs&);
  void (*finish_columns)(const ColumnsArgs&) = nullptr;  // of float32 y; null: transpose and dense->epilogue
};

// One per ISA file (cpu/int8_<level>.cpp).
extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvxVnni;
extern const Kernels kAvx512;
extern const Kernels kAvx512Vbmi2;
#endif

// cpu/int8_launch.cpp: blocking, threads, scratch. `kernels` is what select() chose before work is split.
struct LinearArgs {
  Layout layout;
  Bitmap bitmap;  // that of these which layout names
  Windows windows;
  Blocks blocks;
  const void* x;  // [m, k] of dtype, rows x_stride elements apart
  DType dtype;    // of x and y
  int64_t x_stride;
  int64_t m;
  const float* weight_scale;  // [n]
  const float* bias;          // [n] or null
  Activation activation;
  void* y;  // [m, n], contiguous
};

void linear(const Kernels& kernels, const LinearArgs& args);

}  // namespace fs::sparse_matmul::int8
