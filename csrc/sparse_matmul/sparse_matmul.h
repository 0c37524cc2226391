// sparse_matmul: the contract of every kernel of the family. Read this first. Torch-free.
//
//   sparse_linear   y[M,N] = act(x[M,K] W^T + bias), all float32, W[N,K] in one of the packs of formats/. bitmap32,
//                   sell8 and panels128 packs may hold bfloat16: widened exactly, so the bits of y are those of the
//                   float32 pack of the same values.
//
// Exactness: an output is one chain of fused multiply-adds over ascending k that starts at +0, whatever the format, the
// level, the number of threads and the number of rows: so for finite x the bits of y are always the same. (Slots that a
// format stores as zeros add 0 * x, which changes nothing while x is finite; where x holds a NaN or an infinity the
// outputs that meet it are NaN or infinite in some formats and untouched in others.) bias is added to the finished sum.
//
// Memory: a pack's bytes may be anything once its header and size have passed (formats::view). No index can leave its
// block: k is a u8 into a panel that goes on for 256, a u16 into a row of 65536 (sell16), or lies below 65536 + 256 in
// a row with room for that (sell8, sell4); rows are u8 inside a padded chunk of 256, or are compared with N; offsets,
// the position in the values and the steps of a group are held below the total, behind which there is room for what one
// step of a bitmap may read. Damaged bytes give wrong numbers and never an access outside.
#pragma once
#include <stdint.h>

#include "../runtime/activation.h"
#include "../runtime/features.h"

namespace fs::sparse_matmul {

inline constexpr int kBitmapRows = 4;        // rows of x that one pass over a bitmap32 pack serves
inline constexpr int kSell16PassRows = 3;    // the same of a sell16 pack: more would not fit the registers
inline constexpr int kSell8PassRows = 4;     // and of a sell8 pack
inline constexpr int kSell4PassRows = 4;     // and of a sell4 pack
inline constexpr int64_t kPassRows = 64;     // rows of x that meet a panels128 pack in one pass: up to two panels
inline constexpr int64_t kMaxSellK = 65536;  // of sell16, sell8, sell4 and blocks
inline constexpr int64_t kSell8Slack = 256;  // of x behind kMaxSellK that a damaged sell8 or sell4 pack may have read

inline constexpr int64_t kBitmapColumns = 32;    // outputs of a bitmap32 block
inline constexpr int64_t kSell16Rows = 16;       // outputs of a sell16 slice
inline constexpr int64_t kSell16StepBytes = 96;  // 16 f32, 16 u16
inline constexpr int64_t kSell8Rows = 64;        // outputs of a sell8 slice, and k of x that a step of it may use
inline constexpr int64_t kSell8x32Rows = 32;     // the same of sell8x32
inline constexpr int64_t kSell8x16Rows = 16;     // outputs of a narrow slice of sell8x16; it may use kSell8x32Rows k
inline constexpr int64_t kSell8Base = 16;        // these k begin at a multiple of this
inline constexpr int64_t kSell8Steps = 4;        // steps of a group
inline constexpr int64_t kSell4Rows = 16;        // outputs of a sell4 slice
inline constexpr int64_t kSell4Window = 16;      // k of x that a step of it may use
inline constexpr int64_t kSell4Steps = 8;        // steps of a group
inline constexpr int64_t kSell4PlaceBytes = 4 * kSell4Rows;  // of a group; its values follow
inline constexpr int64_t kSell4GroupBytes = kSell4PlaceBytes + kSell4Steps * kSell4Rows * 4;

inline constexpr int64_t kChunk = 256;        // outputs of the widest chunk of a panels128, blocks or nm pack
inline constexpr int64_t kGroup = 8;          // outputs of a panels128 group, which are stored step by step
inline constexpr int64_t kBlockK = 192;       // k of a panels128 block
inline constexpr int64_t kIndexReach = 256;   // what the indices of a damaged block can say
inline constexpr int64_t kBlockRows = 4;      // rows of x that one pass over a blocks pack serves
inline constexpr int64_t kNmRows = 8;         // the same of an nm pack
inline constexpr int64_t kSlice = 16;         // outputs that stand side by side in such a pack
inline constexpr int64_t kWidestBlock = 16;   // k of the widest block
inline constexpr int64_t kTileRows = 64;      // rows of x in the widest panel for such a pack
inline constexpr int64_t kTileK = 128;        // k that meet such a panel at a time
inline constexpr int64_t kTileSpan = 65536;   // floats of such a panel that meet a blocks pack at a time, at most
inline constexpr int64_t kSlack = 512;        // floats behind the values that may be read
inline constexpr int64_t kColumnsSlack = 16;  // floats behind the sums of a chunk of kChunk outputs that may be read

// The codes of the layouts, in the header of a pack (formats/<layout>.h).
enum Format : int { kBitmap32 = 2, kSell16 = 3, kPanels128 = 4, kSell8 = 8, kBlocks = 9, kNm = 10, kSell4 = 17 };

// Outputs of each chunk of a pack (the last one has what is left): at most kChunk, a multiple of `unit`, and such that
// two threads get equal shares. static: code of an ISA level's object must not be linked into another's.
static inline int64_t chunk_width(int64_t n, int64_t unit) {
  const int64_t chunks = 2 * ((n + 2 * kChunk - 1) / (2 * kChunk));
  return n == 0 ? unit : ((n + chunks - 1) / chunks + unit - 1) / unit * unit;
}
static inline int64_t panel_width(int64_t n) { return chunk_width(n, kGroup); }  // panels128
static inline int64_t tile_width(int64_t n) { return chunk_width(n, kSlice); }   // blocks; nm, whose packs have none

// A group of slices of so many outputs: an index byte and a value of each lane and step.
static inline constexpr int64_t sell8_group_bytes(int64_t rows, int64_t value_bytes) {
  return kSell8Steps * rows * (1 + value_bytes);
}

// A pack, taken apart by formats::view. Only the pointers of its format are set.
struct Pack {
  int format;
  int64_t n, k;
  int64_t total;            // stored values (bitmap32, nm), steps (sell16: of 16 values, panels128: of 8, blocks) or
                            // groups (sell8, sell4)
  uint32_t block;           // blocks, nm, sell8: the header's, which says their shape
  int64_t narrow;           // sell8x16: slices of 16 outputs, which come first; then slices of 64
  int64_t narrow_total;     // sell8x16: groups of the narrow slices
  bool bf16;                // bitmap32, sell8, panels128: of bfloat16
  const uint64_t* offset;   // first value, step or group of each block, slice or chunk, and the total at last;
                            // sell8x16: the same of the narrow slices, then of the others
  const uint32_t* mask;     // bitmap32: [blocks][k], bit j: output 32 * block + j
  const uint32_t* row;      // sell16, sell8, sell4: [slices][16, 32 or 64], output of each lane; N and above: none
  const uint8_t* step;      // sell16: [total][96]; nm: the runs
  const uint16_t* base;     // sell8: [total][4], where the window of each step begins, in 16 k; sell4: [total][8], in k
  const uint8_t* group;     // sell8: [total][sell8_group_bytes(block, 4 or 2)]; sell4: [total][576]
  const uint8_t* order;     // panels128: [chunks][k blocks][W + W / 8]: the rows, then the steps of their groups;
                            // blocks: [slices][16/R]
  const uint8_t* index;     // panels128: [total][8], k inside the block
  const uint8_t* count;     // blocks: [slices][k blocks][16/R]
  const uint16_t* first_k;  // blocks: [total][16/R]
  const float* value;
  const uint16_t* value16;  // bitmap32, panels128 of bfloat16: instead of value, else null
};

// The slices of one width of a sell8x16 pack, as a pack of its own; a kernel gets no other.
static inline Pack narrow_slices(const Pack& p) {
  Pack narrow = p;
  narrow.total = p.narrow_total;
  return narrow;
}
static inline Pack wide_slices(const Pack& p) {
  Pack wide = p;
  wide.block = kSell8Rows;
  wide.total = p.total - p.narrow_total;
  wide.offset += p.narrow + 1;
  wide.row += p.narrow * kSell8x16Rows;
  wide.base += p.narrow_total * kSell8Steps;
  wide.group += p.narrow_total * sell8_group_bytes(kSell8x16Rows, 4);
  return wide;
}

// Sums of blocks (slices) [begin, end) for `rows` rows of x (from 1 up to kBitmapRows, kSell16PassRows, ...): y[r,
// output] = sum. Neither reads y.
struct FewArgs {
  Pack pack;
  const float* x;  // [rows, k], rows x_stride elements apart; for the sell formats kMaxSellK + kSell8Slack floats of
                   // each may be read, for blocks kMaxSellK + kWidestBlock; for blocks and nm zeros follow up to the
                   // end of the last block or run
  int64_t x_stride;
  int64_t rows;
  int64_t begin, end;
  float* y;  // [rows, n], rows y_stride elements apart
  int64_t y_stride;
  bool prefetch;  // sell8 on AVX-512: the pack is asked for ahead of its use
};

// One chunk of outputs for `count` panels of x: sums f32[count][kChunk][lanes], of which the first panel_width(N)
// outputs of each panel become x W^T. Reads no sums before it writes them.
struct PanelArgs {
  Pack pack;
  const float* panels;  // each [K rounded up to kBlockK][lanes], x transposed; rows and k beyond x are zero. Another
                        // kIndexReach - kBlockK rows may be read if the pack is damaged.
  int64_t panel_stride;
  int64_t lanes;  // 8, 16 or 32
  int64_t count;
  int64_t chunk;
  float* sums;
};

// One chunk of outputs of a blocks or nm pack for one panel of x: sums f32[kChunk][lanes], of which the first
// tile_width(N) outputs become x W^T.
struct TileArgs {
  Pack pack;
  const float* panel;  // [K rounded up to kTileK][lanes], x transposed; rows and k beyond x are zero. Another
                       // kTileSpan floats and kTileK rows may be read if the pack is damaged.
  int64_t lanes;       // 8, 16, 32 or 64
  int64_t chunk;
  float* sums;
};

// out[c * out_stride + r] = in[r * in_stride + c]
struct TransposeArgs {
  const float* in;
  int64_t in_stride;
  int64_t rows, columns;
  float* out;
  int64_t out_stride;
};

// y[i] = act(z[i]), z[i] = sum[i] + bias[i]; y may be sum.
struct FinishArgs {
  const float* sum;
  const float* bias;  // or null
  Activation activation;
  int64_t count;
  float* y;
  float* z = nullptr;  // gelu and silu: where z goes, or null
};

// y[r * y_stride + c] = act(z), z = sums[c * lanes + r] + bias[c]
struct ColumnsArgs {
  const float* sums;  // the rows and columns of whole tiles are read: kColumnsSlack floats behind the last sum
  int64_t lanes;
  int64_t rows, columns;
  const float* bias;  // or null
  Activation activation;
  float* y;
  int64_t y_stride;
  float* z = nullptr;  // gelu and silu: where z goes, laid out as y, or null
};

struct SampleArgs;          // training.h
struct ActivationGradArgs;  // training.h

struct Kernels {
  const char* name;
  isa::Level level;
  uint32_t features;
  void (*bitmap)(const FewArgs&);
  void (*bitmap_bf16)(const FewArgs&);  // of Pack::value16
  void (*sell16)(const FewArgs&);
  void (*sell8)(const FewArgs&);
  void (*sell4)(const FewArgs&);
  void (*panels)(const PanelArgs&);
  void (*transpose)(const TransposeArgs&);
  void (*finish)(const FinishArgs&);
  void (*finish_columns)(const ColumnsArgs&);
  void (*sample)(const SampleArgs&);
  void (*activation_grad)(const ActivationGradArgs&);
  void (*block_slices)(const FewArgs&);  // up to kBlockRows rows
  void (*block_panel)(const TileArgs&);
  void (*nm_slices)(const FewArgs&);  // up to kNmRows rows
  void (*nm_panel)(const TileArgs&);
};

// One per ISA file (cpu/<level>.cpp).
extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Vbmi2;
#endif

// cpu/launch.cpp: blocking, threads, scratch. `kernels` is what select() chose before work is split.
struct LinearArgs {
  Pack weight;
  const float* x;  // [m, k], rows x_stride elements apart
  int64_t x_stride;
  int64_t m;
  const float* bias;  // [n] or null
  Activation activation;
  float* y;            // [m, n], contiguous
  float* z = nullptr;  // gelu and silu: where x W^T + bias goes, for the gradient; [m, n], contiguous, or null
};

void linear(const Kernels& kernels, const LinearArgs& args);

}  // namespace fs::sparse_matmul
