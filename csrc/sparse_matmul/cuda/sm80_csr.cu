// spmm and sddmm of a float32 weight in CSR, CUDA sm_80: the products of sparse training.
//   spmm    y[M,N] = act(x[M,K] W^T + bias); with the transposed structure also the gradient to x
//   sddmm   grad[i] = sum_m dy[m, row of i] * x[m, column of i], the gradient to the values alone
// Idea     both need whole columns of x (and of dy), so these are transposed first, rows filled up with zeros to 32.
// spmm     a warp is an output, its lanes are rows of x: 4 each in a panel of 128 rows (1 each up to 32 rows). Indices
//          and values come 32 at a time by a coalesced load and go round by shuffles; a block of 8 warps has 32
//          outputs, whose results pass through shared memory, so that y is written 128 bytes at a time.
// sddmm    a block is a row of W; 8 lanes share a value and read 128 bytes of both columns at once, 4 values each.
// Sums     spmm: one chain of fmaf in the order of the structure, from +0: the CPU's bits for ascending columns. sddmm:
//          lane s of 8 is the chain over m = 4s .. 4s+3, 32 + 4s .., then lanes are added by distance 4, 2, 1. Neither
//          depends on the launch.
// Damage   offsets are held within the values, a column beyond K is taken as a stored zero: nothing outside is read.
//          Places are the caller's own (sm80_structure.cu) and not checked.
// Tails    zeros in the transposed rows; stores guarded.
// Bound    512 bytes of x for 128 fmaf, from L2 where L1 has not the column yet: about 12 of 64 fmaf a clock of an SM.
//          More would take tiles of x in shared memory and columns sorted into blocks of k.
// Open     a row of many values is one warp's (spmm), so a very skewed weight waits for its longest row.
// Measured never run on hardware.
#include <stdexcept>

#include "../../runtime/cuda/activate.h"
#include "../../runtime/cuda/device.h"
#include "holds.h"
#include "sm80.h"

namespace fs::sparse_matmul::sm80 {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kTile = 32;     // of the transposition, and what transposed rows are filled up to
constexpr int kOutputs = 32;  // of a block of spmm
constexpr int kWarps = 8;     // of spmm and of the transposition
constexpr int kThreads = 32 * kWarps;
constexpr int kAhead = 8;  // values whose columns are loaded before the first is used
constexpr int kSampleWarps = 4, kSampleThreads = 32 * kSampleWarps;
constexpr int kShare = 8;  // lanes that share a value of sddmm
constexpr int kEach = 4;   // values that they do at a time

constexpr int64_t padded(int64_t m) { return (m + kTile - 1) / kTile * kTile; }

struct Structure {
  Csr csr;
  int64_t padded_m;
};

// An end of a row's values, held within them.
__device__ __forceinline__ int64_t held(const Structure& s, int32_t at) {
  return max(min(static_cast<int64_t>(at), s.csr.nonzeros), int64_t{0});
}

__device__ __forceinline__ bool is_column(const Structure& s, int32_t column) {
  return column >= 0 && column < s.csr.k;
}

// out[c][r] = in[r][c], r up to height, a multiple of kTile; zero from `rows` on.
__global__ void __launch_bounds__(kThreads)
    transpose(Strided in, int64_t rows, int64_t columns, int64_t height, float* out) {
  FS_SHARED(float, tile, [kTile][kTile + 1]);
  const int lane = static_cast<int>(threadIdx.x) % kTile, warp = static_cast<int>(threadIdx.x) / kTile;
  const int64_t row_tiles = height / kTile;
  const int64_t row0 = blockIdx.x % row_tiles * kTile, column0 = blockIdx.x / row_tiles * kTile;
  if (in.column_stride != 1) {  // the columns lie together already
#pragma unroll
    for (int c = warp; c < kTile; c += kWarps) {
      if (column0 + c >= columns) continue;
      const float* column = in.data + (column0 + c) * in.column_stride;
      out[(column0 + c) * height + row0 + lane] = row0 + lane < rows ? column[row0 + lane] : 0.0f;
    }
    return;
  }
#pragma unroll
  for (int r = warp; r < kTile; r += kWarps) {
    const bool inside = row0 + r < rows && column0 + lane < columns;
    tile[r][lane] = inside ? in.data[(row0 + r) * in.row_stride + column0 + lane] : 0.0f;
  }
  __syncthreads();
#pragma unroll
  for (int c = warp; c < kTile; c += kWarps)
    if (column0 + c < columns) out[(column0 + c) * height + row0 + lane] = tile[lane][c];
}

__device__ __forceinline__ float4 as_floats(uint4 bits) {
  float4 v;
  memcpy(&v, &bits, 16);
  return v;
}

// kRows rows of x of a lane.
template <int kRows>
__device__ __forceinline__ void add_product(float w, const float (&x)[kRows], float (&sum)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) sum[r] = __fmaf_rn(w, x[r], sum[r]);
}

template <int kRows>
__device__ __forceinline__ void load_rows(const float* column, float (&x)[kRows]) {
  if constexpr (kRows == 4) {
    const float4 v = as_floats(ptx::load16(column));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
    x[0] = __ldg(column);
  }
}

// The sums of one output for the lane's rows; `x`: the lane's place in the first transposed row, `inside`: it has one.
template <int kRows>
__device__ __forceinline__ void sum_output(const Structure& s, const float* values, const float* x, int64_t output,
                                           bool inside, float (&sum)[kRows]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t begin = held(s, s.csr.begin[output]), end = held(s, s.csr.end[output]);
  for (int64_t i = begin; i < end; i += 32) {
    const bool mine = i + lane < end;
    const int32_t column = mine ? s.csr.col[i + lane] : 0;
    const bool sound = is_column(s, column);
    float value = 0.0f;
    if (mine && sound) value = values[s.csr.place == nullptr ? i + lane : s.csr.place[i + lane]];
    const int bounded = sound ? column : 0;
    const int count = static_cast<int>(min(end - i, int64_t{32}));
    int j = 0;
    for (; j + kAhead <= count; j += kAhead) {
      float w[kAhead], column_of_x[kAhead][kRows] = {};
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        w[a] = __shfl_sync(kAll, value, j + a);
        const int64_t at = __shfl_sync(kAll, bounded, j + a);
        if (inside) load_rows(x + at * s.padded_m, column_of_x[a]);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) add_product(w[a], column_of_x[a], sum);
    }
    for (; j < count; ++j) {
      float column_of_x[kRows] = {};
      const float w = __shfl_sync(kAll, value, j);
      const int64_t at = __shfl_sync(kAll, bounded, j);
      if (inside) load_rows(x + at * s.padded_m, column_of_x);
      add_product(w, column_of_x, sum);
    }
  }
}

// Where the sums of (output, lane) lie: outputs one word apart from a multiple of 32, or chunks of 16 bytes swizzled.
template <int kRows>
__device__ __forceinline__ int place(int output, int lane) {
  return kRows == 4 ? 128 * output + 4 * (lane ^ (output % 8)) : 33 * output + lane;
}

struct Epilogue {
  const float* bias;
  Activation activation;
  HeaderIs header;
};

template <int kRows>
__global__ void __launch_bounds__(kThreads)
    spmm_rows(Structure s, const float* values, const float* x, int64_t m, Epilogue e, float* y) {
  FS_SHARED(float, results, [kOutputs * (kRows == 4 ? 128 : 33)]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  constexpr int kPanel = 32 * kRows;
  const int64_t panels = (m + kPanel - 1) / kPanel;
  const int64_t output0 = blockIdx.x / panels * kOutputs, row0 = blockIdx.x % panels * kPanel;
  const int64_t row = row0 + lane * kRows;
  for (int o = warp; o < kOutputs; o += kWarps) {
    float sum[kRows] = {};
    if (output0 + o < s.csr.n) sum_output<kRows>(s, values, x + row, output0 + o, row < s.padded_m, sum);
    float* target = results + place<kRows>(o, lane);
    if constexpr (kRows == 4) {
      uint4 bits;
      memcpy(&bits, sum, 16);
      ptx::store16(target, bits);
    } else {
      *target = sum[0];
    }
  }
  __syncthreads();
  // Lanes are outputs now.
  const int64_t output = output0 + lane;
  const bool inside = output < s.csr.n, right = holds(e.header);
  const float bias = e.bias != nullptr && inside ? e.bias[output] : -0.0f;
  for (int group = warp; group < 32; group += kWarps) {
    float sum[kRows];
    const float* source = results + place<kRows>(lane, group);
    if constexpr (kRows == 4) {
      const float4 v = as_floats(ptx::load16(source));
      sum[0] = v.x, sum[1] = v.y, sum[2] = v.z, sum[3] = v.w;
    } else {
      sum[0] = *source;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (row0 + group * kRows + r < m && inside)
        y[(row0 + group * kRows + r) * s.csr.n + output] =
            right ? activate(e.activation, __fadd_rn(sum[r], bias)) : not_a_number();
  }
}

// dy and x are transposed, [n] and [k] rows of padded_m.
__global__ void __launch_bounds__(kSampleThreads)
    sddmm_values(Structure s, const float* dy, const float* x, HeaderIs header, float* grad) {
  constexpr int kGroups = 32 / kShare;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int group = lane / kShare, share = lane % kShare;
  if (!holds(header)) {
    for (int64_t i = int64_t{blockIdx.x} * kSampleThreads + threadIdx.x; i < s.csr.nonzeros;
         i += int64_t{gridDim.x} * kSampleThreads)
      grad[i] = not_a_number();
    return;
  }
  const int64_t row = blockIdx.x, begin = held(s, s.csr.begin[row]), end = held(s, s.csr.end[row]);
  dy += row * s.padded_m;
  for (int64_t i0 = begin + warp * kGroups * kEach; i0 < end; i0 += kSampleWarps * kGroups * kEach) {
    const float* column[kEach];
    bool sound[kEach];
    float sum[kEach] = {};
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      const int64_t i = i0 + u * kGroups + group;
      const int32_t k = i < end ? s.csr.col[i] : -1;
      sound[u] = is_column(s, k);
      column[u] = x + (sound[u] ? k : 0) * s.padded_m;
    }
    for (int64_t m = 4 * share; m < s.padded_m; m += 4 * kShare) {
      const float4 d = as_floats(ptx::load16(dy + m));
#pragma unroll
      for (int u = 0; u < kEach; ++u) {
        const float4 v = as_floats(ptx::load16(column[u] + m));
        sum[u] = __fmaf_rn(d.x, v.x, sum[u]);
        sum[u] = __fmaf_rn(d.y, v.y, sum[u]);
        sum[u] = __fmaf_rn(d.z, v.z, sum[u]);
        sum[u] = __fmaf_rn(d.w, v.w, sum[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
#pragma unroll
      for (int step = kShare / 2; step > 0; step /= 2) sum[u] = __fadd_rn(sum[u], __shfl_xor_sync(kAll, sum[u], step));
      const int64_t i = i0 + u * kGroups + group;
      if (share == u && i < end) grad[i] = sound[u] ? sum[u] : 0.0f;
    }
  }
}

static_assert(kEach <= kShare, "a lane of those that share stores each value");

void transpose_to(const Strided& in, int64_t rows, int64_t columns, float* out, cudaStream_t stream) {
  const int64_t tiles = padded(rows) / kTile * ((columns + kTile - 1) / kTile);
  if (tiles > 0)
    launch({dim3(static_cast<unsigned>(tiles)), dim3(kThreads), 0, stream}, transpose, in, rows, columns, padded(rows),
           out);
}

// A damaged structure may have values and no column.
Structure structure_of(const Csr& w, int64_t m) {
  Structure s{w, padded(m)};
  if (w.k == 0) s.csr.nonzeros = 0;
  return s;
}

}  // namespace

int64_t spmm_scratch_floats(const Csr& weight, int64_t m) { return padded(m) * weight.k; }
int64_t sddmm_scratch_floats(const Csr& weight, int64_t m) { return padded(m) * (weight.k + weight.n); }

void spmm(const SpmmArgs& args, float* scratch, void* stream) {
  if (args.m == 0 || args.weight.n == 0) return;
  auto* s = static_cast<cudaStream_t>(stream);
  transpose_to(args.x, args.m, args.weight.k, scratch, s);
  const Structure structure = structure_of(args.weight, args.m);
  const int64_t outputs = (args.weight.n + kOutputs - 1) / kOutputs;
  const auto start = [&](auto kernel, int64_t panel) {
    launch({dim3(static_cast<unsigned>(outputs * ((args.m + panel - 1) / panel))), dim3(kThreads), 0, s}, kernel,
           structure, args.values, static_cast<const float*>(scratch), args.m,
           Epilogue{args.bias, args.activation, args.header}, args.y);
  };
  if (args.m <= 32) return start(spmm_rows<1>, 32);
  start(spmm_rows<4>, 128);
}

void sddmm(const SddmmArgs& args, float* scratch, void* stream) {
  const Csr& weight = args.weight;
  if (weight.n == 0 || weight.nonzeros == 0) return;
  auto* s = static_cast<cudaStream_t>(stream);
  float *x_there = scratch, *dy_there = scratch + padded(args.m) * weight.k;
  transpose_to(args.x, args.m, weight.k, x_there, s);
  transpose_to(args.dy, args.m, weight.n, dy_there, s);
  launch({dim3(static_cast<unsigned>(weight.n)), dim3(kSampleThreads), 0, s}, sddmm_values,
         structure_of(weight, args.m), static_cast<const float*>(dy_there), static_cast<const float*>(x_there),
         args.header, args.grad);
}

}  // namespace fs::sparse_matmul::sm80
