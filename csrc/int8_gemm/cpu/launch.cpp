// Blocking, threads, scratch and tails of int8_gemm; knows no ISA.
#include <algorithm>
#include <cstring>

#include "../../runtime/parallel.h"
#include "../../runtime/workspace.h"
#include "../formats/vnni16.h"
#include "../int8_gemm.h"
#include "../select.h"

namespace fs::int8_gemm {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The packed weight as tiles read it.
struct Weight {
  const int8_t* data;
  const int32_t* column_sum;
  int64_t n, k;
  int64_t panel_stride() const { return kPanelColumns * vnni16::padded_k(k); }
};

// A thread's scratch for one chunk of rows: the panel, then the scales, one tile of sums, and what enter() writes.
struct ChunkScratch {
  uint8_t* panel;
  int64_t block_stride;
  float* scale;
  int32_t* acc;
  int32_t* start;
  int8_t* widened;  // a column panel as widen_weights() writes it
  uint8_t* rest;    // `extra` bytes, at a multiple of 64

  ChunkScratch(const Kernels& kernels, int64_t rows, int64_t k, int64_t columns, int64_t extra = 0) {
    const int64_t blocks = std::max<int64_t>(ceil_div(vnni16::padded_k(k) * kernels.panel_bytes, kBlockBytes), 1);
    block_stride = round_up(rows, kernels.row_step) * kRowStride;
    const int64_t panel_bytes = round_up(blocks * block_stride, 64);
    const int64_t scale_bytes = round_up(rows * static_cast<int64_t>(sizeof(float)), 64);
    const int64_t sums = std::max<int64_t>(kMaxTileRows * kMaxTileColumns,
                                           kernels.whole_row && rows == 1 ? round_up(columns, kPanelColumns) : 0);
    const int64_t acc_bytes = sums * static_cast<int64_t>(sizeof(int32_t));
    const int64_t start_bytes = kernels.enter == nullptr ? 0 : round_up(columns, kPanelColumns) * 4;
    const int64_t widened_bytes = kernels.widen_weights == nullptr ? 0 : 2 * kPanelColumns * vnni16::padded_k(k);
    panel = scratch(static_cast<size_t>(panel_bytes + scale_bytes + acc_bytes + start_bytes + widened_bytes + extra));
    scale = reinterpret_cast<float*>(panel + panel_bytes);
    acc = reinterpret_cast<int32_t*>(panel + panel_bytes + scale_bytes);
    start = reinterpret_cast<int32_t*>(panel + panel_bytes + scale_bytes + acc_bytes);
    widened = reinterpret_cast<int8_t*>(panel + panel_bytes + scale_bytes + acc_bytes + start_bytes);
    rest = panel + panel_bytes + scale_bytes + acc_bytes + start_bytes + widened_bytes;
  }
};

// Where a chunk's result goes: its row 0, column 0 of the weight.
struct Result {
  const void* data;
  int64_t row_bytes, element_bytes;
};

// All tiles of a chunk of `rows` rows over columns [n_begin, n_end): `run(tile, row, column, columns)` for each. Column
// panels outside, row tiles inside: a column panel is read from L2 once a chunk and stays in L1.
template <class Run>
void for_each_tile(const Kernels& kernels, const ChunkScratch& s, int64_t rows, const Weight& w, int64_t n_begin,
                   int64_t n_end, int32_t offset, const Result& y, const Run& run) {
  const int64_t tiles = ceil_div(rows, kernels.max_rows);
  const int64_t tile_rows = round_up(ceil_div(rows, tiles), kernels.row_step);  // even: 26 rows are 13 + 13
  const int64_t n_padded = round_up(n_end, kPanelColumns);
  const int64_t width = kernels.whole_row && rows == 1 ? n_padded - n_begin : columns_for(kernels, tile_rows);
  const int64_t stride = w.panel_stride();
  if (kernels.enter != nullptr) kernels.enter(w.column_sum + n_begin, n_padded - n_begin, offset, s.start);
  TileArgs t;
  t.block_stride = s.block_stride;
  t.panel_stride = stride;
  t.offset = offset;
  t.k_steps = vnni16::padded_k(w.k) / kStepK;
  t.acc = s.acc;
  t.acc_stride = kMaxTileColumns;
  t.in_l2 = in_l2(w.n, w.k);
  t.stream = one_stream(tile_rows, w.n, w.k);
  t.shuffle = shuffle_stream(w.n, w.k);
  t.prefetch_ahead = prefetch_ahead(kernels, tile_rows, w.n, w.k);
  t.prefetch_pages = prefetch_pages(w.n, w.k);
  t.y = nullptr;
  t.y_stride = y.row_bytes;
  t.y_late = prefetch_result_late();
  const bool prefetch_y = prefetch_result();
  for (int64_t n = n_begin; n < n_end; n += width) {
    const int64_t columns = std::min(width, n_padded - n);
    const int8_t* weight = w.data + n / kPanelColumns * stride;
    const int64_t next_columns = std::min(width, n_padded - n - columns);
    // Each row tile brings its share of the next column panel to L2.
    const int64_t share = t.in_l2 || next_columns <= 0 ? 0 : ceil_div(next_columns / kPanelColumns * stride, tiles);
    const int8_t* next = share == 0 ? nullptr : weight + columns / kPanelColumns * stride;
    // One panel at a time: rows that are many enough have tiles of one.
    const bool widen = kernels.widen_weights != nullptr && tiles >= kTilesToWiden && columns == kPanelColumns;
    if (widen) kernels.widen_weights(weight, t.k_steps, s.widened);
    t.weight = weight;
    t.widened = widen ? s.widened : nullptr;
    t.columns = columns;
    t.column_sum = w.column_sum + n;
    t.start = s.start + (n - n_begin);
    t.prefetch_bytes = share;
    t.prefetch_next = next;
    for (int64_t row = 0; row < rows; row += tile_rows) {
      t.panel = s.panel + row * kRowStride;
      t.rows = std::min(tile_rows, rows - row);
      if (prefetch_y) t.y = static_cast<const char*>(y.data) + row * y.row_bytes + n * y.element_bytes;
      run(t, row, n, std::min(columns, n_end - n));
      if (next != nullptr) t.prefetch_next += share;
    }
  }
  if (kernels.leave != nullptr) kernels.leave();
}

// Calls body(row_begin, row_end, n_begin, n_end) for parts of [0, m) x [0, n), one a thread: of rows, or of columns.
template <class Body>
void split(int64_t m, int64_t n, int64_t k, bool by_rows, const Body& body) {
  const int64_t threads = m * n * k < (int64_t{1} << 17) ? 1 : num_threads();  // 16x16 to 48x48: a region costs more
  if (threads <= 1) return body(0, m, 0, n);
  if (by_rows) {
    const int64_t part = ceil_div(m, threads);
    parallel_for(ceil_div(m, part), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i * part, std::min((i + 1) * part, m), 0, n);
    });
  } else {
    const int64_t part = round_up(ceil_div(n, threads), kMaxTileColumns);
    parallel_for(ceil_div(n, part), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(0, m, i * part, std::min((i + 1) * part, n));
    });
  }
}

int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace

void linear(const Kernels& kernels, const LinearArgs& args) {
  if (args.m == 0 || args.n == 0) return;
  const Weight w{vnni16::weights(args.weight), vnni16::column_sums(args.weight, args.n, args.k), args.n, args.k};
  const int32_t offset = kernels.panel_offset + (args.dynamic ? 0 : args.x_zero_point);
  const int64_t x_bytes = args.x_codes ? 1 : element_bytes(args.dtype);
  const int64_t residual_bytes = element_bytes(args.y_dtype);
  const int64_t y_bytes = args.requantize ? 1 : element_bytes(args.y_dtype);
  split(args.m, args.n, args.k, split_rows(kernels, args.m, args.n, args.k),
        [&](int64_t row_begin, int64_t row_end, int64_t n_begin, int64_t n_end) {
          const int64_t chunk = chunk_rows(kernels, row_end - row_begin, args.k);
          const ChunkScratch s(kernels, chunk, args.k, n_end - n_begin);
          if (args.x_codes) std::fill_n(s.scale, chunk, args.x_scale);
          for (int64_t m = row_begin; m < row_end; m += chunk) {
            const int64_t rows = std::min(chunk, row_end - m);
            const void* x = static_cast<const char*>(args.x) + m * args.x_stride * x_bytes;
            if (args.x_codes)
              kernels.widen({static_cast<const int8_t*>(x), args.x_stride, rows, args.k, s.panel, s.block_stride});
            else
              kernels.quantize({x, args.dtype, args.x_stride, rows, args.k, s.panel, s.block_stride, args.dynamic,
                                args.x_scale, args.x_zero_point, s.scale});
            const float* scale = args.x_scales == nullptr ? s.scale : args.x_scales + m;
            const Result y{static_cast<const char*>(args.y) + m * args.n * y_bytes, args.n * y_bytes, y_bytes};
            for_each_tile(kernels, s, rows, w, n_begin, n_end, offset, y,
                          [&](const TileArgs& t, int64_t row, int64_t n, int64_t columns) {
                            EpilogueArgs e;
                            e.acc = s.acc;
                            e.rows = t.rows;
                            e.columns = columns;
                            e.x_scale = scale + row;
                            e.weight_scale = args.weight_scale + n;
                            e.bias = args.bias == nullptr ? nullptr : args.bias + n;
                            e.residual = args.residual == nullptr
                                             ? nullptr
                                             : static_cast<const char*>(args.residual) +
                                                   ((m + row) * args.residual_stride + n) * residual_bytes;
                            e.residual_stride = args.residual_stride;
                            e.activation = args.activation;
                            e.y = static_cast<char*>(args.y) + ((m + row) * args.n + n) * y_bytes;
                            e.dtype = args.y_dtype;
                            e.y_stride = args.n;
                            e.requantize = args.requantize;
                            e.y_scale = args.y_scale;
                            e.y_zero_point = args.y_zero_point;
                            if (kernels.tile_to_y != nullptr && kernels.tile_to_y(t, e)) return;
                            kernels.tile(t);
                            kernels.epilogue(e);
                          });
          }
        });
}

namespace {

// Elements [k_begin, k) of columns [0, n) of b, one at a time, for what Kernels::pack does not take.
void pack_plainly(const PackArgs& p, int64_t k_begin, int64_t k, int64_t n_begin, int64_t n) {
  for (int64_t j = n_begin; j < n; ++j) {
    int8_t* column = p.cells + j / kPanelColumns * p.panel_stride + j % kPanelColumns * kStepK;
    for (int64_t i = k_begin; i < k; ++i) {
      const int8_t value = p.b[i * p.stride_k + j * p.stride_n];
      column[i / kStepK * kPanelColumns * kStepK + i % kStepK] = value;
      p.column_sum[j] += value;
    }
  }
}

// Columns [n_begin, n_end) of B into panels and sums, padding included.
void pack_columns(const Kernels& kernels, const MatmulArgs& args, int64_t n_begin, int64_t n_end, int8_t* cells,
                  int32_t* column_sum) {
  const int64_t columns = n_end - n_begin, padded = round_up(columns, kPanelColumns), k = args.k;
  PackArgs p{args.b + n_begin * args.b_stride_n,
             args.b_stride_k,
             args.b_stride_n,
             k / kStepK * kStepK,
             columns / kPanelColumns * kPanelColumns,
             cells,
             kPanelColumns * vnni16::padded_k(k),
             column_sum};
  std::fill_n(column_sum, padded, 0);
  if (kernels.pack == nullptr || (p.stride_k != 1 && p.stride_n != 1)) p.k = p.columns = 0;
  // Padding lies in the last step of each panel, and in the last panel.
  if (p.k < k)
    for (int64_t panel = 0; panel < padded / kPanelColumns; ++panel)
      std::memset(cells + panel * p.panel_stride + p.k * kPanelColumns, 0,
                  static_cast<size_t>(p.panel_stride - p.k * kPanelColumns));
  if (p.columns < columns)
    std::memset(cells + p.columns / kPanelColumns * p.panel_stride, 0,
                static_cast<size_t>((padded - p.columns) / kPanelColumns * p.panel_stride));
  if (p.columns > 0) kernels.pack(p);
  pack_plainly(p, p.k, k, 0, p.columns);
  pack_plainly(p, 0, k, p.columns, columns);
}

}  // namespace

void matmul(const Kernels& kernels, const MatmulArgs& args) {
  if (args.m == 0 || args.n == 0) return;
  const int64_t panel_stride = kPanelColumns * vnni16::padded_k(args.k);
  // Columns, so that no part of B is packed twice, unless there are too few of them to share.
  const bool by_rows = args.n < kMaxTileColumns * num_threads() && args.m > args.n;
  split(args.m, args.n, args.k, by_rows, [&](int64_t row_begin, int64_t row_end, int64_t n_begin, int64_t n_end) {
    // B comes unpacked: so many columns of it at a time are packed as stay in L2 while all rows meet them.
    const int64_t chunk = chunk_rows(kernels, row_end - row_begin, args.k);
    const int64_t block =
        std::min(packed_columns(args.k, chunk >= row_end - row_begin), round_up(n_end - n_begin, kPanelColumns));
    const int64_t cell_bytes = block / kPanelColumns * panel_stride;
    const ChunkScratch s(kernels, chunk, args.k, block, cell_bytes + block * 4);
    auto* cells = reinterpret_cast<int8_t*>(s.rest);
    auto* column_sum = reinterpret_cast<int32_t*>(s.rest + cell_bytes);
    for (int64_t n0 = n_begin; n0 < n_end; n0 += block) {
      const int64_t n1 = std::min(n0 + block, n_end);
      pack_columns(kernels, args, n0, n1, cells, column_sum);
      const Weight w{cells, column_sum, n1 - n0, args.k};
      for (int64_t m = row_begin; m < row_end; m += chunk) {
        const int64_t rows = std::min(chunk, row_end - m);
        if (n0 == n_begin || chunk < row_end - row_begin)  // a single chunk stays widened
          kernels.widen({args.a + m * args.a_stride, args.a_stride, rows, args.k, s.panel, s.block_stride});
        const Result c{args.c + m * args.n + n0, args.n * 4, 4};
        for_each_tile(kernels, s, rows, w, 0, n1 - n0, kernels.panel_offset, c,
                      [&](const TileArgs& t, int64_t row, int64_t n, int64_t columns) {
                        int32_t* to = args.c + (m + row) * args.n + n0 + n;
                        if (kernels.strided_sums && t.rows > kernels.few_rows && columns == t.columns) {
                          TileArgs direct = t;
                          direct.acc = to;
                          direct.acc_stride = args.n;
                          return kernels.tile(direct);
                        }
                        kernels.tile(t);
                        for (int64_t r = 0; r < t.rows; ++r)
                          std::memcpy(to + r * args.n, s.acc + r * kMaxTileColumns,
                                      static_cast<size_t>(columns) * sizeof(int32_t));
                      });
      }
    }
  });
}

}  // namespace fs::int8_gemm
