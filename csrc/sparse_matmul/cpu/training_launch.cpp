// Blocking, threads and scratch of the training products; knows no ISA.
#include <algorithm>
#include <cstring>

#include "../../runtime/parallel.h"
#include "../../runtime/workspace.h"
#include "../formats/packed_format.h"
#include "../formats/structure.h"
#include "../select.h"
#include "../sparse_matmul.h"
#include "../training.h"

namespace fs::sparse_matmul {
namespace {

constexpr int64_t kSlab = 256;  // rows m of which the panels of a chunk and of a block are kept near

using formats::ceil_div;
float* float_scratch2(int64_t floats) {
  return reinterpret_cast<float*>(scratch<2>(static_cast<size_t>(floats) * sizeof(float)));
}

template <class Body>
void split(int64_t count, bool alone, const Body& body) {
  if (alone && count > 0) return body(0, count);
  parallel_for(count, body);
}

// The values in the order of a pack. Without branches: what is no label comes as it likes.
void refresh(const LabelledPack& pack, const float* values, int64_t nonzeros, float* out) {
  constexpr int64_t kPart = 16384;
  const auto count = static_cast<uint32_t>(nonzeros);
  split(ceil_div(pack.floats, kPart), one_thread(1, nonzeros), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kPart; i < std::min(end * kPart, pack.floats); ++i) {
      const uint32_t place = pack.label[i] - kFirstLabel, valid = place < count ? UINT32_MAX : 0;
      uint32_t bits;
      std::memcpy(&bits, values + (place & valid), sizeof bits);
      bits &= valid;
      std::memcpy(out + i, &bits, sizeof bits);
    }
  });
}

// A panel f32[padded columns][lanes] of rows [row, row + rows) of a matrix; what lies beyond it is zero.
void fill_panel(const Kernels& kernels, const Strided& x, int64_t row, int64_t rows, int64_t columns, int64_t padded,
                int64_t lanes, float* panel) {
  const float* from = x.data + row * x.row_stride;
  if (rows < lanes) std::memset(panel, 0, static_cast<size_t>(columns * lanes) * sizeof(float));
  if (x.column_stride == 1)
    kernels.transpose({from, x.row_stride, rows, columns, panel, lanes});
  else
    for (int64_t c = 0; c < columns; ++c)
      std::memcpy(panel + c * lanes, from + c * x.column_stride, static_cast<size_t>(rows) * sizeof(float));
  std::memset(panel + columns * lanes, 0, static_cast<size_t>((padded - columns) * lanes) * sizeof(float));
}

// Lanes of a panel of sample().
int64_t sample_lanes(int64_t rows) { return rows > 32 ? 64 : rows > 16 ? 32 : 16; }

}  // namespace

void product(const Kernels& kernels, const ProductArgs& args) {
  const StructureView& s = *args.weight;
  const LabelledPack& labelled = args.transposed ? s.transposed : s.forward;
  if (args.m == 0 || labelled.pack.n == 0) return;
  float* const values = float_scratch2(labelled.floats + 1);  // never null
  if (s.nonzeros > 0)
    refresh(labelled, args.values, s.nonzeros, values);
  else
    std::memset(values, 0, static_cast<size_t>(labelled.floats) * sizeof(float));
  LinearArgs linear_args{labelled.pack, args.x, args.x_stride, args.m, args.bias, args.activation, args.y, args.z};
  linear_args.weight.value = values;
  linear(kernels, linear_args);
}

void activation_grad(const Kernels& kernels, const ActivationGradArgs& args) {
  constexpr int64_t kPart = 16384;
  split(ceil_div(args.count, kPart), one_thread(1, args.count), [&](int64_t begin, int64_t end) {
    const int64_t at = begin * kPart;
    kernels.activation_grad(
        {args.grad + at, args.saved + at, args.activation, std::min(end * kPart, args.count) - at, args.out + at});
  });
}

void sample(const Kernels& kernels, const SampleProductArgs& args) {
  const StructureView& s = *args.weight;
  if (s.nonzeros == 0) return;
  if (args.m == 0) {
    std::memset(args.values, 0, static_cast<size_t>(s.nonzeros) * sizeof(float));
    return;
  }
  const int64_t chunks = ceil_div(s.n, kSampleOutputs), blocks = ceil_div(s.k, kSampleColumns);
  const int64_t padded_n = chunks * kSampleOutputs, padded_k = blocks * kSampleColumns;
  const bool alone = one_thread(args.m, s.nonzeros);
  const int64_t slab = std::min(kSlab, ceil_div(args.m, kSampleRows) * kSampleRows);
  float* const p = float_scratch2(slab * (padded_n + padded_k) + kSampleColumns * kSampleRows);
  float* const q = p + slab * padded_n;
  for (int64_t begin = 0; begin < args.m; begin += kSlab) {
    const int64_t rows = std::min(kSlab, args.m - begin), panels = ceil_div(rows, kSampleRows);
    const auto panel_rows = [&](int64_t panel) { return std::min(kSampleRows, rows - panel * kSampleRows); };
    split(2 * panels, alone, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t panel = i / 2, row = panel * kSampleRows, lanes = sample_lanes(panel_rows(panel));
        if (i % 2 == 0)
          fill_panel(kernels, args.p, begin + row, panel_rows(panel), s.n, padded_n, lanes, p + row * padded_n);
        else
          fill_panel(kernels, args.q, begin + row, panel_rows(panel), s.k, padded_k, lanes, q + row * padded_k);
      }
    });
    split(chunks * blocks, alone, [&](int64_t from, int64_t to) {
      for (int64_t unit = from; unit < to; ++unit) {
        const int64_t chunk = unit / blocks, block = unit % blocks;
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int64_t row = panel * kSampleRows, lanes = sample_lanes(panel_rows(panel));
          kernels.sample({s.order + unit * 2 * kSampleOutputs, s.start + unit * kSampleOutputs, s.index, s.nonzeros,
                          p + row * padded_n + chunk * kSampleOutputs * lanes,
                          q + row * padded_k + block * kSampleColumns * lanes, lanes, begin + panel > 0, args.values});
        }
      }
    });
  }
}

}  // namespace fs::sparse_matmul
