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

constexpr int64_t kSellStride = kMaxSellK + 1024;  // floats between the rows that a sell format reads
static_assert(kSellStride >= kMaxSellK + kSell8Slack, "a row goes as far as a base and an index can say");

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
    const int64_t at = r * args.weight.n + column;
    kernels.finish({args.y + at, args.bias == nullptr ? nullptr : args.bias + column, args.activation, columns,
                    args.y + at, args.z == nullptr ? nullptr : args.z + at});
  }
}

// A format for few rows of x.
struct FewFormat {
  void (*kernel)(const FewArgs&);
  int pass_rows;   // of x that one call serves
  int64_t width;   // outputs of a block or slice
  int64_t stored;  // values for each of Pack::total
  bool scattered;  // a block's outputs lie anywhere, and its indices reach beyond x in a damaged pack
};

FewFormat few_format(const Kernels& kernels, const Pack& weight) {
  switch (weight.format) {
    case kSell16: return {kernels.sell16, kSell16PassRows, kSell16Rows, kSell16Rows, true};
    case kSell4: return {kernels.sell4, kSell4PassRows, kSell4Rows, kSell4Steps * kSell4Rows, true};
    case kSell8: {
      const int64_t width = weight.block == kSell8x16Rows ? kSell8Rows : weight.block;  // of most slices
      return {kernels.sell8, kSell8PassRows, width, kSell8Steps * width, true};
    }
    default: return {weight.bf16 ? kernels.bitmap_bf16 : kernels.bitmap, kBitmapRows, kBitmapColumns, 1, false};
  }
}

// Rows of x where each index of a sell pack can be read, whatever the pack says. What lies beyond K is never used for a
// sound pack. The stride keeps equal columns out of the same cache sets.
const float* copy_for_sell(const LinearArgs& args) {
  constexpr int64_t kRows = std::max({kSell16PassRows, kSell8PassRows, kSell4PassRows});
  auto* x = reinterpret_cast<float*>(scratch(static_cast<size_t>(kRows * kSellStride) * sizeof(float)));
  for (int64_t r = 0; r < args.m; ++r) std::copy_n(args.x + r * args.x_stride, args.weight.k, x + r * kSellStride);
  return x;
}

// The block where part `part` of `parts` begins, so that all parts hold as many values. For any offsets: the parts of a
// damaged pack are some parts of its blocks.
int64_t first_block(const Pack& w, int64_t blocks, int64_t part, int64_t parts) {
  int64_t begin = 0;
  for (int64_t i = 1; i <= part; ++i)
    begin = i == parts
                ? blocks
                : std::lower_bound(w.offset + begin, w.offset + blocks, static_cast<uint64_t>(w.total * i / parts)) -
                      w.offset;
  return begin;
}

// The blocks or slices of one width, all of them.
struct Blocks {
  Pack pack;
  int64_t count;
};

void linear_few(const Kernels& kernels, const LinearArgs& args) {
  const Pack& w = args.weight;
  const FewFormat f = few_format(kernels, w);
  if (f.scattered)
    std::memset(args.y, 0, static_cast<size_t>(args.m * w.n) * sizeof(float));  // damaged rows may leave gaps
  Blocks widths[2] = {{w, ceil_div(w.n, f.width)}, {}};
  if (w.format == kSell8 && w.block == kSell8x16Rows) {
    widths[0] = {narrow_slices(w), w.narrow};
    widths[1] = {wide_slices(w), ceil_div(w.n - w.narrow * kSell8x16Rows, kSell8Rows)};
  }
  // Even passes: 5 rows are 3 + 2, not 4 + 1.
  const int64_t passes = ceil_div(args.m, f.pass_rows), height = ceil_div(args.m, passes);
  const int64_t parts = one_thread(args.m, w.total * f.stored)
                            ? 1
                            : std::min(std::max<int64_t>(num_threads(), 1), widths[0].count + widths[1].count);
  split(parts, parts == 1, [&](int64_t first, int64_t last) {
    for (int64_t row = 0; row < args.m; row += height) {
      LinearArgs part = args;
      part.m = std::min(height, args.m - row);
      part.x += row * args.x_stride;
      float* const y = args.y + row * w.n;
      const float* const x = f.scattered ? copy_for_sell(part) : part.x;
      const int64_t stride = f.scattered ? kSellStride : args.x_stride;
      for (const Blocks& blocks : widths) {
        const Pack& p = blocks.pack;
        const int64_t begin = first_block(p, blocks.count, first, parts);
        const int64_t end = first_block(p, blocks.count, last, parts);
        if (begin == end) continue;
        f.kernel({p, x, stride, part.m, begin, end, y, w.n, prefetch_sell8(p, part.m)});
        const int64_t column = begin * f.width;
        if (!f.scattered) finish_rows(kernels, args, row, part.m, column, std::min(end * f.width, w.n) - column);
      }
    }
  });
  if (f.scattered) finish_rows(kernels, args, 0, args.m, 0, w.n);
}

// Rows of x for blocks and nm packs: behind K come zeros to the end of the last block or run (each at most 64 wide),
// and room for every index that a damaged blocks pack may hold, which a sound one never touches.
struct PaddedX {
  float* x;
  int64_t stride;
  explicit PaddedX(const LinearArgs& args) {
    const int64_t k = args.weight.k, padded = ceil_div(k, 64) * 64;
    stride = padded + 16;  // equal columns lie in different cache sets
    const int64_t room = args.weight.format == kBlocks ? kMaxSellK + kWidestBlock : 0;
    x = reinterpret_cast<float*>(scratch<1>(static_cast<size_t>(args.m * stride + room) * sizeof(float)));
    for (int64_t r = 0; r < args.m; ++r) {
      std::copy_n(args.x + r * args.x_stride, k, x + r * stride);
      std::fill_n(x + r * stride + k, padded - k, 0.0f);
    }
  }
};

void linear_slices(const Kernels& kernels, const LinearArgs& args) {
  const Pack& w = args.weight;
  const bool blocks = w.format == kBlocks;
  if (blocks) std::memset(args.y, 0, static_cast<size_t>(args.m * w.n) * sizeof(float));  // damaged rows leave gaps
  const PaddedX x(args);
  const int64_t passes = ceil_div(args.m, blocks ? kBlockRows : kNmRows), height = ceil_div(args.m, passes);
  const int64_t slices = ceil_div(w.n, kSlice);
  const bool alone = one_thread(args.m, blocks ? w.total * kSlice : w.total);
  const int64_t parts = alone ? 1 : std::min<int64_t>(std::max<int64_t>(num_threads(), 1), slices);
  split(parts, alone, [&](int64_t first, int64_t last) {
    // Slices of nm are all as long, those of blocks are sorted by length in their chunk.
    const int64_t begin = blocks ? first_block(w, slices, first, parts) : first * slices / parts;
    const int64_t end = blocks ? first_block(w, slices, last, parts) : last * slices / parts;
    for (int64_t row = 0; row < args.m; row += height) {
      const int64_t rows = std::min(height, args.m - row), column = begin * kSlice;
      (blocks ? kernels.block_slices : kernels.nm_slices)(
          {w, x.x + row * x.stride, x.stride, rows, begin, end, args.y + row * w.n, w.n, false});
      if (!blocks && begin < end) finish_rows(kernels, args, row, rows, column, std::min(end * kSlice, w.n) - column);
    }
  });
  if (blocks) finish_rows(kernels, args, 0, args.m, 0, w.n);  // a slice's outputs lie anywhere in their chunk
}

// Transposed straight into y, 16 rows that lie a multiple of 4 KB apart push each other out of L1. Such rows of y are
// transposed into room for so many, and then go to y one after the other.
constexpr int64_t kRowsBack = 16, kBackFloats = kChunk * kRowsBack;
static_assert(kBackFloats >= kColumnsSlack, "finish_columns may read behind the sums, where that room is");
bool far_rows(int64_t n) { return n % 1024 == 0; }

// The sums of a chunk, `columns` outputs from `column` on, for rows [row, row + rows) of x: into y.
void finish_chunk(const Kernels& kernels, const LinearArgs& args, const float* sums, int64_t lanes, int64_t row,
                  int64_t rows, int64_t column, int64_t columns, float* back) {
  const int64_t n = args.weight.n;
  const float* const bias = args.bias == nullptr ? nullptr : args.bias + column;
  float* const y = args.y + row * n + column;
  float* const z = args.z == nullptr ? nullptr : args.z + row * n + column;
  if (!far_rows(n)) return kernels.finish_columns({sums, lanes, rows, columns, bias, args.activation, y, n, z});
  for (int64_t r = 0; r < rows; r += kRowsBack) {
    const int64_t height = std::min(kRowsBack, rows - r);
    kernels.transpose({sums + r, lanes, columns, height, back, kChunk});
    for (int64_t i = 0; i < height; ++i)
      kernels.finish({back + i * kChunk, bias, args.activation, columns, y + (r + i) * n,
                      z == nullptr ? nullptr : z + (r + i) * n});
  }
}

// A thread's scratch: x transposed, the sums of a chunk, and room for finish_chunk().
struct TileScratch {
  float *x, *sums, *back;
  TileScratch(int64_t lanes, int64_t padded_k) {
    const int64_t chunk = kChunk * lanes, panel = padded_k * lanes + kTileSpan + kTileK * lanes;
    x = reinterpret_cast<float*>(scratch(static_cast<size_t>(panel + chunk + kBackFloats) * sizeof(float)));
    sums = x + panel;
    back = sums + chunk;
  }
};

// Chunks [begin, end) of outputs of a blocks or nm pack for rows [row_begin, row_end) of x.
void linear_tiles_part(const Kernels& kernels, const LinearArgs& args, int64_t row_begin, int64_t row_end,
                       int64_t begin, int64_t end) {
  const Pack& w = args.weight;
  const auto panel = w.format == kBlocks ? kernels.block_panel : kernels.nm_panel;
  const int64_t padded_k = ceil_div(w.k, kTileK) * kTileK, width = tile_width(w.n);
  const TileScratch s(tile_lanes(row_end - row_begin), padded_k);
  for (int64_t row = row_begin; row < row_end;) {
    const int64_t lanes = tile_lanes(row_end - row), rows = std::min(lanes, row_end - row);
    if (rows < lanes) std::memset(s.x, 0, static_cast<size_t>(padded_k * lanes) * sizeof(float));
    kernels.transpose({args.x + row * args.x_stride, args.x_stride, rows, w.k, s.x, lanes});
    std::memset(s.x + w.k * lanes, 0, static_cast<size_t>((padded_k - w.k) * lanes) * sizeof(float));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      panel({w, s.x, lanes, chunk, s.sums});
      const int64_t column = chunk * width, columns = std::min(width, w.n - column);
      finish_chunk(kernels, args, s.sums, lanes, row, rows, column, columns, s.back);
    }
    row += rows;
  }
}

void linear_tiles(const Kernels& kernels, const LinearArgs& args) {
  const Pack& w = args.weight;
  const int64_t chunks = ceil_div(w.n, tile_width(w.n)), panels = ceil_div(args.m, kTileRows);
  const bool alone = one_thread(args.m, w.format == kBlocks ? w.total * kSlice : w.total);
  if (panels >= num_threads() || chunks == 1) {
    split(ceil_div(args.m, kRowsShare), alone, [&](int64_t begin, int64_t end) {
      linear_tiles_part(kernels, args, begin * kRowsShare, std::min(end * kRowsShare, args.m), 0, chunks);
    });
  } else {
    split(chunks, alone, [&](int64_t begin, int64_t end) { linear_tiles_part(kernels, args, 0, args.m, begin, end); });
  }
}

// Rows [row, row + rows) of x, to be transposed into `count` panels of `lanes` rows that meet the weight in one pass.
struct Panels {
  int64_t row, rows, lanes, count;
};

// The widest panels first.
template <class Body>
void each_pass(int64_t begin, int64_t end, const Body& body) {
  while (begin < end) {
    // The last panel may be filled to a half and one row: it would be no narrower alone.
    const int64_t left = end - begin, lanes = panel_lanes(left), fit = (left + lanes / 2 - 1) / lanes;
    const int64_t count = std::clamp(fit, int64_t{1}, kPassRows / lanes), rows = std::min(count * lanes, left);
    body(Panels{begin, rows, lanes, count});
    begin += rows;
  }
}

int64_t padded_k(const LinearArgs& args) { return ceil_div(args.weight.k, kBlockK) * kBlockK; }

// Floats of a panel of x, with what a damaged pack may read behind it.
int64_t panel_floats(const LinearArgs& args, int64_t lanes) { return (padded_k(args) + kIndexReach - kBlockK) * lanes; }

// Columns [begin, end) of x, up to the padded K, into the panels.
void fill_panels(const Kernels& kernels, const LinearArgs& args, const Panels& p, int64_t begin, int64_t end,
                 float* x) {
  const int64_t k = std::max(begin, std::min(end, args.weight.k));
  for (int64_t r = 0; r < p.rows; r += p.lanes, x += panel_floats(args, p.lanes)) {
    const int64_t rows = std::min(p.lanes, p.rows - r), dense = rows < p.lanes ? begin : k;
    std::memset(x + dense * p.lanes, 0, static_cast<size_t>((end - dense) * p.lanes) * sizeof(float));
    kernels.transpose(
        {args.x + (p.row + r) * args.x_stride + begin, args.x_stride, rows, k - begin, x + begin * p.lanes, p.lanes});
  }
}

constexpr int64_t kSumsFloats = kChunk * kPassRows + kBackFloats;

// Chunks [begin, end) of outputs for one pass; `sums` has room for kSumsFloats.
void pass(const Kernels& kernels, const LinearArgs& args, const Panels& p, const float* x, int64_t begin, int64_t end,
          float* sums) {
  const Pack& w = args.weight;
  float* const back = sums + kChunk * kPassRows;
  const int64_t width = panel_width(w.n);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    kernels.panels({w, x, panel_floats(args, p.lanes), p.lanes, p.count, chunk, sums});
    const int64_t column = chunk * width, columns = std::min(width, w.n - column);
    for (int64_t r = 0; r < p.rows; r += p.lanes)
      finish_chunk(kernels, args, sums + r * kChunk, p.lanes, p.row + r, std::min(p.lanes, p.rows - r), column, columns,
                   back);
  }
}

template <int kSlot = 0>
float* scratch_floats(int64_t count) {
  return reinterpret_cast<float*>(scratch<kSlot>(static_cast<size_t>(count) * sizeof(float)));
}

void linear_panels(const Kernels& kernels, const LinearArgs& args) {
  const int64_t chunks = ceil_div(args.weight.n, panel_width(args.weight.n)), k = padded_k(args);
  const bool alone = one_thread(args.m, args.weight.total * kGroup);
  const auto part = [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
    float* const x = scratch_floats(kSumsFloats + panel_floats(args, kPassRows)) + kSumsFloats;
    each_pass(row_begin, row_end, [&](const Panels& p) {
      fill_panels(kernels, args, p, 0, k, x);
      pass(kernels, args, p, x, begin, end, x - kSumsFloats);
    });
  };
  if (alone || chunks == 1 || args.m >= kPassRows * num_threads())  // each thread has rows of its own
    return split(ceil_div(args.m, kRowsShare), alone, [&](int64_t begin, int64_t end) {
      part(begin * kRowsShare, std::min(end * kRowsShare, args.m), 0, chunks);
    });
  // Each thread has outputs of its own, and its own panels if x is small.
  if (args.m * k < kSharedPanels)
    return split(chunks, alone, [&](int64_t begin, int64_t end) { part(0, args.m, begin, end); });
  int64_t rows = 0;
  each_pass(0, args.m, [&](const Panels& p) { rows += p.lanes * p.count; });
  float* const panels = scratch_floats<1>(panel_floats(args, rows));
  split(k / kBlockK, alone, [&](int64_t begin, int64_t end) {
    float* x = panels;
    each_pass(0, args.m, [&](const Panels& p) {
      fill_panels(kernels, args, p, begin * kBlockK, end * kBlockK, x);
      x += panel_floats(args, p.lanes * p.count);
    });
  });
  split(chunks, alone, [&](int64_t begin, int64_t end) {
    const float* x = panels;
    each_pass(0, args.m, [&](const Panels& p) {
      pass(kernels, args, p, x, begin, end, scratch_floats(kSumsFloats));
      x += panel_floats(args, p.lanes * p.count);
    });
  });
}

}  // namespace

void linear(const Kernels& kernels, const LinearArgs& given) {
  if (given.m == 0 || given.weight.n == 0) return;
  LinearArgs args = given;
  if (args.weight.k == 0) args.weight.total = args.weight.narrow_total = 0;  // there is no x to read, whatever it says
  if (args.weight.format == kPanels128) return linear_panels(kernels, args);
  if (args.weight.format == kBlocks || args.weight.format == kNm)
    return few_rows(args.weight, args.m) ? linear_slices(kernels, args) : linear_tiles(kernels, args);
  linear_few(kernels, args);
}

}  // namespace fs::sparse_matmul
