// Blocking, threads, scratch and tails of sparse_matmul; knows no ISA.
#include <algorithm>
#include <cstring>

#include "../../runtime/parallel.h"
#include "../../runtime/workspace.h"
#include "../formats/packed_format.h"
#include "../select.h"
#include "../sparse_matmul.h"

namespace fs::sparse_matmul {
namespace {

constexpr int64_t kSellStride = kMaxSellK + 1024;  // floats between the rows that sell16 reads

using formats::ceil_div;

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

void finish_rows(const Kernels& kernels, const LinearArgs& args, int64_t row, int64_t rows, int64_t column,
                 int64_t columns) {
  if (args.bias == nullptr && args.activation == Activation::none) return;
  for (int64_t r = row; r < row + rows; ++r) {
    float* y = args.y + r * args.weight.n + column;
    kernels.finish({y, args.bias == nullptr ? nullptr : args.bias + column, args.activation, columns, y});
  }
}

// Rows of x for sell16: where each of its 16-bit indices can be read, whatever the pack says. What lies beyond K is
// never touched for a sound pack. The stride keeps equal columns out of the same cache sets.
const float* copy_for_sell(const LinearArgs& args) {
  auto* x = reinterpret_cast<float*>(scratch(static_cast<size_t>(kFewSellRows * kSellStride) * sizeof(float)));
  for (int64_t r = 0; r < args.m; ++r) std::copy_n(args.x + r * args.x_stride, args.weight.k, x + r * kSellStride);
  return x;
}

void linear_few(const Kernels& kernels, const LinearArgs& args) {
  const Pack& w = args.weight;
  const bool bitmap = w.format == kBitmap32;
  const int64_t width = bitmap ? kBitmapColumns : kSellRows;
  if (!bitmap)
    std::memset(args.y, 0, static_cast<size_t>(args.m * w.n) * sizeof(float));  // damaged rows may leave gaps
  // Even passes: 5 rows are 3 + 2, not 4 + 1.
  const int64_t passes = ceil_div(args.m, bitmap ? kBitmapRows : kFewSellRows), height = ceil_div(args.m, passes);
  split(ceil_div(w.n, width), one_thread(args.m, bitmap ? w.total : w.total * kSellRows),
        [&](int64_t begin, int64_t end) {
          for (int64_t row = 0; row < args.m; row += height) {
            LinearArgs part = args;
            part.m = std::min(height, args.m - row);
            part.x += row * args.x_stride;
            float* const y = args.y + row * w.n;
            if (bitmap) {
              kernels.bitmap({w, part.x, args.x_stride, part.m, begin, end, y, w.n});
              const int64_t column = begin * width;
              finish_rows(kernels, args, row, part.m, column, std::min(end * width, w.n) - column);
            } else {
              kernels.sell({w, copy_for_sell(part), kSellStride, part.m, begin, end, y, w.n});
            }
          }
        });
  if (!bitmap) finish_rows(kernels, args, 0, args.m, 0, w.n);  // a slice's outputs lie anywhere
}

// A thread's scratch: x transposed, the sums of a chunk, and these transposed back.
struct PanelScratch {
  float *x, *sums, *rows;
  PanelScratch(int64_t lanes, int64_t padded_k) {
    const int64_t chunk = kChunk * lanes, panel = (padded_k + kBlockK) * lanes;
    x = reinterpret_cast<float*>(scratch(static_cast<size_t>(panel + 2 * chunk) * sizeof(float)));
    sums = x + panel;
    rows = sums + chunk;
  }
};

// Chunks [begin, end) of outputs for rows [row_begin, row_end) of x.
void linear_panels_part(const Kernels& kernels, const LinearArgs& args, int64_t row_begin, int64_t row_end,
                        int64_t begin, int64_t end) {
  const Pack& w = args.weight;
  const int64_t padded_k = ceil_div(w.k, kBlockK) * kBlockK;
  const PanelScratch s(panel_lanes(row_end - row_begin), padded_k);
  for (int64_t row = row_begin; row < row_end;) {
    const int64_t lanes = panel_lanes(row_end - row), rows = std::min(lanes, row_end - row);
    if (rows < lanes) std::memset(s.x, 0, static_cast<size_t>(padded_k * lanes) * sizeof(float));
    kernels.transpose({args.x + row * args.x_stride, args.x_stride, rows, w.k, s.x, lanes});
    std::memset(s.x + w.k * lanes, 0, static_cast<size_t>((padded_k - w.k) * lanes) * sizeof(float));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      kernels.panel({w, s.x, lanes, chunk, s.sums});
      const int64_t column = chunk * kChunk, columns = std::min(kChunk, w.n - column);
      kernels.transpose({s.sums, lanes, columns, rows, s.rows, kChunk});
      for (int64_t r = 0; r < rows; ++r)
        kernels.finish({s.rows + r * kChunk, args.bias == nullptr ? nullptr : args.bias + column, args.activation,
                        columns, args.y + (row + r) * w.n + column});
    }
    row += rows;
  }
}

void linear_panels(const Kernels& kernels, const LinearArgs& args) {
  const int64_t chunks = ceil_div(args.weight.n, kChunk), panels = ceil_div(args.m, kPanelRows);
  const bool alone = one_thread(args.m, args.weight.total);
  if (panels >= num_threads() || chunks == 1) {
    split(panels, alone, [&](int64_t begin, int64_t end) {
      linear_panels_part(kernels, args, begin * kPanelRows, std::min(end * kPanelRows, args.m), 0, chunks);
    });
  } else {
    split(chunks, alone, [&](int64_t begin, int64_t end) { linear_panels_part(kernels, args, 0, args.m, begin, end); });
  }
}

}  // namespace

void linear(const Kernels& kernels, const LinearArgs& given) {
  if (given.m == 0 || given.weight.n == 0) return;
  LinearArgs args = given;
  if (args.weight.k == 0) args.weight.total = 0;  // whatever the pack says: there is no x to read
  if (args.weight.format == kPanels128) return linear_panels(kernels, args);
  linear_few(kernels, args);
}

}  // namespace fs::sparse_matmul
