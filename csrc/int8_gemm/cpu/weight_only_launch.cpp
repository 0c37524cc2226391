// Blocking, threads, scratch and tails of weight_only_linear; knows no ISA.
#include <algorithm>
#include <cstring>

#include "../../runtime/parallel.h"
#include "../../runtime/workspace.h"
#include "../formats/bitmap_u4.h"
#include "../formats/u4.h"
#include "../formats/vnni16.h"
#include "../int8_gemm.h"
#include "../select.h"

namespace fs::int8_gemm {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Any format as tiles read it. Of a bitmap the codes are made in scratch.
struct Weight {
  bool u4;
  int64_t group, groups;
  const uint8_t* codes;
  int64_t panel_stride;
  const uint16_t* scale = nullptr;
  int64_t scale_stride = 0;
  const uint8_t* zero = nullptr;
  int64_t zero_stride = 0;
  int64_t bytes;

  explicit Weight(const WeightOnlyArgs& a) {
    u4 = a.weight_scale == nullptr;
    if (a.bitmap != nullptr) {
      group = a.bitmap->group;
      groups = a.bitmap->groups();
      codes = nullptr;
      panel_stride = bitmap_u4::layout(*a.bitmap).panel_bytes();
      scale = a.bitmap->scale;
      scale_stride = groups * kPanelColumns;
      bytes = a.bitmap->total + ceil_div(a.n, kPanelColumns) * a.bitmap->cells() * 16;
      return;
    }
    if (!u4) {
      group = kGroupS8;
      groups = ceil_div(a.k, group);
      codes = a.weight + vnni16::kHeaderBytes;
      panel_stride = kPanelColumns * vnni16::padded_k(a.k);
      bytes = vnni16::weight_bytes(a.n, a.k);
      return;
    }
    PackHeader h;
    std::memcpy(&h, a.weight, sizeof h);
    const u4::Layout layout{a.n, a.k, h.block, h.dtype == u4::kDTypeAffine};
    group = layout.group;
    groups = layout.groups();
    codes = u4::codes(a.weight);
    panel_stride = layout.panel_bytes();
    scale = u4::scales(a.weight, layout);
    scale_stride = layout.panel_scales();
    zero = u4::zeros(a.weight, layout);
    zero_stride = layout.panel_zero_bytes();
    bytes = layout.bytes();
  }
};

// A thread's scratch for one chunk of rows: codes, scales and sums of x, then one tile, and the cells of a tile's
// columns where they have to be made.
struct Scratch {
  int8_t* codes;
  int64_t block_stride;
  float* scale;
  int32_t* sum;
  int64_t group_stride;
  float* acc;
  uint8_t* cells;

  Scratch(int64_t rows, int64_t max_rows, const Weight& w, bool with_cells) {
    block_stride = rows * kBlockK;
    group_stride = rows;
    const int64_t code_bytes = ceil_div(w.groups * w.group, kBlockK) * block_stride;
    const int64_t group_bytes = round_up(w.groups * rows * 4, 64);
    const int64_t acc_bytes = max_rows * kWeightOnlyColumns * 4;
    const int64_t cell_bytes = with_cells ? kWeightOnlyColumns / kPanelColumns * w.panel_stride : 0;
    uint8_t* p = scratch(static_cast<size_t>(code_bytes + 2 * group_bytes + acc_bytes + cell_bytes));
    codes = reinterpret_cast<int8_t*>(p);
    scale = reinterpret_cast<float*>(p + code_bytes);
    sum = reinterpret_cast<int32_t*>(p + code_bytes + group_bytes);
    acc = reinterpret_cast<float*>(p + code_bytes + 2 * group_bytes);
    cells = p + code_bytes + 2 * group_bytes + acc_bytes;
  }
};

int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// True: a bitmap whose tiles are not read as it is.
bool makes_cells(const WeightOnlyArgs& a, int64_t rows) {
  return a.bitmap != nullptr && (a.bitmap_kernels == nullptr || rows > a.bitmap_kernels->max_rows);
}

// Columns outside, row tiles inside: weights come from memory once a chunk.
void multiply(const Kernels& kernels, const WeightOnlyArgs& a, const Weight& w, const Scratch& s, int64_t m,
              int64_t rows, int64_t n_begin, int64_t n_end) {
  const WeightOnlyKernels& k = *kernels.weight_only;
  const int64_t tile_rows = ceil_div(rows, ceil_div(rows, k.max_rows));  // even
  const bool cells = makes_cells(a, rows), bitmap = a.bitmap != nullptr && !cells;
  const int64_t bytes = element_bytes(a.dtype);
  for (int64_t n = n_begin; n < n_end; n += kWeightOnlyColumns) {
    const int64_t columns = std::min<int64_t>(kWeightOnlyColumns, n_end - n);
    const int64_t panel = n / kPanelColumns;
    float scales[kWeightOnlyColumns];  // s8: the last panel may be wider than the scales there are
    if (!w.u4) {
      std::copy_n(a.weight_scale + n, columns, scales);
      std::fill(scales + columns, scales + kWeightOnlyColumns, 0.0f);
    }
    if (cells)
      for (int64_t i = 0; i < ceil_div(columns, kPanelColumns); ++i) {
        uint8_t* out = s.cells + i * w.panel_stride;
        if (a.bitmap_kernels != nullptr)
          a.bitmap_kernels->cells(*a.bitmap, panel + i, bitmap_prefetch_ahead(w.bytes), out);
        else
          bitmap_u4::cells(*a.bitmap, panel + i, out);
      }
    for (int64_t row = 0; row < rows; row += tile_rows) {
      GroupTileArgs t;
      t.x = s.codes + row * kBlockK;
      t.block_stride = s.block_stride;
      t.x_scale = s.scale + row;
      t.x_sum = s.sum + row;
      t.group_stride = s.group_stride;
      t.rows = std::min(tile_rows, rows - row);
      t.columns = round_up(columns, kPanelColumns);
      t.groups = w.groups;
      t.group = w.group;
      t.k_steps = vnni16::padded_k(a.k) / kStepK;
      t.weight = cells ? s.cells : bitmap ? nullptr : w.codes + panel * w.panel_stride;
      t.panel_stride = w.panel_stride;
      t.scale = w.u4 ? w.scale + panel * w.scale_stride : nullptr;
      t.scale_stride = w.scale_stride;
      t.zero = w.zero == nullptr ? nullptr : w.zero + panel * w.zero_stride;
      t.zero_stride = w.zero_stride;
      t.scale_f32 = w.u4 ? nullptr : scales;
      t.acc = s.acc;
      const bool far = row == 0 && !cells;
      t.stream = w.u4 && !bitmap && weight_only_stream(kernels, rows);
      t.prefetch_ahead = !far     ? 0
                         : bitmap ? bitmap_prefetch_ahead(w.bytes)
                                  : weight_only_prefetch_ahead(w.bytes, t.stream);
      t.prefetch_pages = far ? weight_only_prefetch_pages(w.bytes) : 0;
      if (bitmap)
        a.bitmap_kernels->tile(t, *a.bitmap, panel);
      else
        (w.u4 ? k.tile_u4 : k.tile_s8)(t);
      FinishArgs f;
      f.acc = s.acc;
      f.rows = t.rows;
      f.columns = columns;
      f.bias = a.bias == nullptr ? nullptr : a.bias + n;
      f.activation = a.activation;
      f.y = static_cast<char*>(a.y) + ((m + row) * a.n + n) * bytes;
      f.dtype = a.dtype;
      f.y_stride = a.n;
      k.finish(f);
    }
  }
}

}  // namespace

void weight_only_linear(const Kernels& kernels, const WeightOnlyArgs& args) {
  if (args.m == 0 || args.n == 0) return;
  const Weight w(args);
  const int64_t bytes = element_bytes(args.dtype);
  // Threads share the columns: each reads its part of the weights, and quantizes all of x.
  const int64_t threads = args.m * args.n * args.k < (int64_t{1} << 17) ? 1 : num_threads();
  const int64_t part = round_up(ceil_div(args.n, threads), kWeightOnlyColumns);
  parallel_for(ceil_div(args.n, part), [&](int64_t begin, int64_t end) {
    const int64_t chunk = weight_only_rows(kernels, args.m);
    const Scratch s(chunk, kernels.weight_only->max_rows, w, makes_cells(args, chunk));
    for (int64_t m = 0; m < args.m; m += chunk) {
      const int64_t rows = std::min(chunk, args.m - m);
      GroupQuantizeArgs q;
      q.x = static_cast<const char*>(args.x) + m * args.x_stride * bytes;
      q.dtype = args.dtype;
      q.x_stride = args.x_stride;
      q.rows = rows;
      q.k = args.k;
      q.group = w.group;
      q.codes = s.codes;
      q.block_stride = s.block_stride;
      q.scale = s.scale;
      q.sum = s.sum;
      q.group_stride = s.group_stride;
      kernels.weight_only->quantize(q);
      multiply(kernels, args, w, s, m, rows, begin * part, std::min(end * part, args.n));
    }
  });
}

}  // namespace fs::int8_gemm
