// Blocking, threads, scratch and tails of sparse_int8_linear; knows no ISA.
#include <algorithm>
#include <cstring>

#include "../../runtime/parallel.h"
#include "../../runtime/workspace.h"
#include "../int8.h"
#include "../int8_select.h"

namespace fs::sparse_matmul::int8 {
namespace {

using int8_gemm::kMaxTileColumns;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Calls body(begin, end) for parts of [0, count), one a thread.
template <class Body>
void split(int64_t count, bool alone, const Body& body) {
  const int64_t threads = alone ? 1 : std::min<int64_t>(num_threads(), count);
  if (threads <= 1) return body(0, count);
  const int64_t part = ceil_div(count, threads);
  parallel_for(ceil_div(count, part), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i * part, std::min((i + 1) * part, count));
  });
}

// Rows of so many k are a block of an A panel, and quantized together.
bool one_block(const Kernels& kernels, int64_t k) { return k * kernels.dense->panel_bytes <= int8_gemm::kBlockBytes; }

// Bytes between the rows of codes: whole blocks of what quantize writes, and out of step with the sets of L1.
int64_t code_stride(const Kernels& kernels, int64_t k) {
  return one_block(kernels, k) ? int8_gemm::kRowStride : round_up(k * kernels.dense->panel_bytes, 256) + 64;
}

// Codes of rows [row, row + rows), code_stride apart. Longer rows come one after the other: the blocks of a panel of
// one row lie side by side.
void quantize(const Kernels& kernels, const LinearArgs& args, int64_t k, int64_t row, int64_t rows, uint8_t* codes,
              float* scale) {
  const int64_t step = one_block(kernels, k) ? rows : 1;
  for (int64_t r = 0; r < rows; r += step)
    kernels.dense->quantize({static_cast<const char*>(args.x) + (row + r) * args.x_stride * element_bytes(args.dtype),
                             args.dtype, args.x_stride, step, k, codes + r * code_stride(kernels, k),
                             int8_gemm::kBlockBytes, true, 0.0f, 0, scale + r});
}

// acc[rows][kMaxTileColumns] -> y[row ..][column .. column + columns)
void finish(const Kernels& kernels, const LinearArgs& args, int64_t n, const int32_t* acc, const float* scale,
            int64_t row, int64_t rows, int64_t column, int64_t columns) {
  int8_gemm::EpilogueArgs e{};
  e.acc = acc;
  e.rows = rows;
  e.columns = columns;
  e.x_scale = scale;
  e.weight_scale = args.weight_scale + column;
  e.bias = args.bias == nullptr ? nullptr : args.bias + column;
  e.activation = args.activation;
  e.y = static_cast<char*>(args.y) + (row * n + column) * element_bytes(args.dtype);
  e.dtype = args.dtype;
  e.y_stride = n;
  kernels.dense->epilogue(e);
}

void linear_few(const Kernels& kernels, const LinearArgs& args) {
  const Bitmap& w = args.bitmap;
  // Even passes: 5 rows are 3 + 2, not 4 + 1.
  const int64_t passes = ceil_div(args.m, kernels.few_rows), height = ceil_div(args.m, passes);
  const int64_t stride = code_stride(kernels, w.k);
  uint8_t* const codes = scratch<1>(static_cast<size_t>(height * stride) + 64);
  auto* const scale = reinterpret_cast<float*>(codes + height * stride);  // at most 16 of them
  constexpr int64_t kPanels = kMaxTileColumns / kTileOutputs;
  const int64_t ahead = prefetch_ahead(w.total + w.panels() * w.steps() * 8);
  for (int64_t row = 0; row < args.m; row += height) {
    const int64_t rows = std::min(height, args.m - row);
    quantize(kernels, args, w.k, row, rows, codes, scale);
    split(ceil_div(w.panels(), kPanels), one_thread(rows, w.total), [&](int64_t begin, int64_t end) {
      alignas(64) int32_t acc[16 * kMaxTileColumns];
      for (int64_t panel = begin * kPanels; panel < std::min(end * kPanels, w.panels()); panel += kPanels) {
        const int64_t panels = std::min(kPanels, w.panels() - panel);
        kernels.bitmap({w, codes, stride, rows, panel, panels, kernels.dense->panel_offset, ahead, acc});
        const int64_t column = panel * kTileOutputs;
        finish(kernels, args, w.n, acc, scale, row, rows, column, std::min(panels * kTileOutputs, w.n - column));
      }
    });
  }
}

// Rows [row, row + rows) of x, whose codes lie at `codes`, against blocks [begin, end) of kMaxTileColumns outputs: a
// block stays in L1 or L2 for all rows.
void windows_blocks(const Kernels& kernels, const LinearArgs& args, const uint8_t* codes, const float* scale,
                    int64_t row, int64_t rows, int64_t begin, int64_t end) {
  const Windows& w = args.windows;
  constexpr int64_t kSlices = kMaxTileColumns / kWindowOutputs;
  alignas(64) int32_t acc[kWindowRows * kMaxTileColumns];
  const int64_t stride = code_stride(kernels, w.k);
  const int64_t passes = ceil_div(rows, kWindowRows), height = ceil_div(rows, passes);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t slice = block * kSlices, slices = std::min(kSlices, w.slices() - slice);
    const int64_t column = block * kMaxTileColumns, columns = std::min<int64_t>(kMaxTileColumns, w.n - column);
    for (int64_t r = 0; r < rows; r += height) {
      const int64_t count = std::min(height, rows - r);
      kernels.windows({w, codes + r * stride, stride, count, slice, slices, kernels.dense->panel_offset, acc});
      finish(kernels, args, w.n, acc, scale + r, row + r, count, column, columns);
    }
  }
}

// Rows of codes: what L2 holds beside a block of the weight.
constexpr int64_t kWindowCodes = int64_t{1} << 18;
constexpr int64_t kWindowChunk = 64;

template <int kSlot>
void windows_part(const Kernels& kernels, const LinearArgs& args, int64_t row_begin, int64_t row_end, bool alone) {
  const Windows& w = args.windows;
  const int64_t stride = code_stride(kernels, w.k), blocks = ceil_div(w.n, kMaxTileColumns);
  const int64_t most = std::clamp(kWindowCodes / stride / kWindowRows * kWindowRows, kWindowRows, kWindowChunk);
  const int64_t passes = ceil_div(row_end - row_begin, most), height = ceil_div(row_end - row_begin, passes);
  // Behind the rows there is room for windows of a damaged pack.
  const int64_t room = kWindowReach * kernels.dense->panel_bytes;
  auto* const scale =
      reinterpret_cast<float*>(scratch<kSlot>(static_cast<size_t>(kWindowChunk * 4 + height * stride + room)));
  uint8_t* const codes = reinterpret_cast<uint8_t*>(scale + kWindowChunk);
  for (int64_t row = row_begin; row < row_end; row += height) {
    const int64_t rows = std::min(height, row_end - row);
    quantize(kernels, args, w.k, row, rows, codes, scale);
    split(blocks, alone,
          [&](int64_t begin, int64_t end) { windows_blocks(kernels, args, codes, scale, row, rows, begin, end); });
  }
}

void linear_windows(const Kernels& kernels, const LinearArgs& args) {
  const int64_t chunks = ceil_div(args.m, kWindowChunk);
  const bool alone = one_thread(args.m, args.windows.total * kStepBytes / 2);
  if (alone || chunks < num_threads()) return windows_part<1>(kernels, args, 0, args.m, alone);
  split(chunks, alone, [&](int64_t begin, int64_t end) {
    windows_part<0>(kernels, args, begin * kWindowChunk, std::min(end * kWindowChunk, args.m), true);
  });
}

// Rows of the next panel of x when so many are left.
int64_t lanes_for(const Kernels& kernels, int64_t left) {
  return left > 2 * kernels.width ? 4 * kernels.width : left > kernels.width ? 2 * kernels.width : kernels.width;
}

// A thread's scratch: codes of a panel's rows, the panel, the sums of a chunk, these by rows, and the scales.
struct PanelScratch {
  uint8_t *codes, *panel;
  int32_t *sums, *acc;
  float* scale;
  PanelScratch(const Kernels& kernels, const Blocks& w, int64_t lanes) {
    const int64_t code_bytes = lanes * code_stride(kernels, w.k);
    // kGroups more: an index of a damaged pack ends there.
    const int64_t panel_bytes = (w.k_blocks() + 1) * kGroups * kTileK * kernels.dense->panel_bytes * lanes;
    const int64_t sum_bytes = kOutputs * lanes * 4, acc_bytes = lanes * kMaxTileColumns * 4;
    codes = scratch(static_cast<size_t>(code_bytes + panel_bytes + sum_bytes + acc_bytes + lanes * 4));
    panel = codes + code_bytes;
    sums = reinterpret_cast<int32_t*>(panel + panel_bytes);
    acc = reinterpret_cast<int32_t*>(panel + panel_bytes + sum_bytes);
    scale = reinterpret_cast<float*>(panel + panel_bytes + sum_bytes + acc_bytes);
  }
};

// out[c][r] = in[r][c] for 4-byte elements, whatever they are: a transpose of floats moves bits.
void transpose(const Kernels& kernels, const void* in, int64_t in_stride, int64_t rows, int64_t columns, void* out,
               int64_t out_stride) {
  kernels.moves->transpose(
      {static_cast<const float*>(in), in_stride, rows, columns, static_cast<float*>(out), out_stride});
}

// Chunks [begin, end) of outputs for rows [row_begin, row_end) of x.
void linear_panels_part(const Kernels& kernels, const LinearArgs& args, int64_t row_begin, int64_t row_end,
                        int64_t begin, int64_t end) {
  const Blocks& w = args.blocks;
  const int64_t dwords = w.groups() * kernels.dense->panel_bytes, stride = code_stride(kernels, w.k);
  const PanelScratch s(kernels, w, lanes_for(kernels, row_end - row_begin));
  for (int64_t row = row_begin; row < row_end;) {
    const int64_t lanes = lanes_for(kernels, row_end - row), rows = std::min(lanes, row_end - row);
    quantize(kernels, args, w.k, row, rows, s.codes, s.scale);
    transpose(kernels, s.codes, stride / 4, rows, dwords, s.panel, lanes);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      if (w.k == 0)
        std::memset(s.sums, 0, static_cast<size_t>(kOutputs * lanes) * 4);
      else
        kernels.blocks({w, s.panel, lanes, chunk, kernels.dense->panel_offset, s.sums});
      if (kernels.finish_columns != nullptr && args.dtype == DType::f32) {
        const int64_t n = chunk * kOutputs;
        kernels.finish_columns({s.sums, lanes, rows, std::min<int64_t>(kOutputs, w.n - n), s.scale,
                                args.weight_scale + n, args.bias == nullptr ? nullptr : args.bias + n, args.activation,
                                static_cast<float*>(args.y) + row * w.n + n, w.n});
        continue;
      }
      for (int64_t n = chunk * kOutputs; n < std::min((chunk + 1) * kOutputs, w.n); n += kMaxTileColumns) {
        const int64_t columns = std::min<int64_t>(kMaxTileColumns, w.n - n);
        transpose(kernels, s.sums + (n - chunk * kOutputs) * lanes, lanes, columns, rows, s.acc, kMaxTileColumns);
        finish(kernels, args, w.n, s.acc, s.scale, row, rows, n, columns);
      }
    }
    row += rows;
  }
}

void linear_panels(const Kernels& kernels, const LinearArgs& args) {
  const Blocks& w = args.blocks;
  const int64_t tallest = 4 * kernels.width, panels = ceil_div(args.m, tallest);
  const bool alone = one_thread(args.m, w.total * w.rows * kTileK);
  if (panels >= num_threads() || w.chunks() == 1) {
    split(panels, alone, [&](int64_t begin, int64_t end) {
      linear_panels_part(kernels, args, begin * tallest, std::min(end * tallest, args.m), 0, w.chunks());
    });
  } else {
    split(w.chunks(), alone,
          [&](int64_t begin, int64_t end) { linear_panels_part(kernels, args, 0, args.m, begin, end); });
  }
}

}  // namespace

void linear(const Kernels& kernels, const LinearArgs& args) {
  if (args.m == 0) return;
  switch (args.layout) {
    case Layout::bitmap: return args.bitmap.n == 0 ? void() : linear_few(kernels, args);
    case Layout::windows: return args.windows.n == 0 ? void() : linear_windows(kernels, args);
    case Layout::blocks: return args.blocks.n == 0 ? void() : linear_panels(kernels, args);
  }
}

}  // namespace fs::sparse_matmul::int8
