// sparse_linear from blocks16, CUDA sm_80: y[M,N] = act(x W^T + bias), W in squares of b = 32 or 64 of which only the
// stored ones are read and multiplied, all float16 or bfloat16, sums in float32.
// Idea     a thread block takes one row of squares, b outputs, and goes from square to square; each brings b columns of
//          x with it. mma.m16n8k16 with x as A and the square as B, whose rows are the columns that B wants.
// Tile     b 64: 128 rows x 64 outputs, b 32: 256 x 32; 4 warps of 64 x 32 each. Up to 32 rows: 32 x b. A stage is a
//          square with its x; a ring of 3 (b 64) or 4 stages by cp.async.
// Order    rows of squares with the most stored ones first; the row tiles of a group of 16 side by side, so that a
//          group's x stays in L2 while all squares pass over it.
// Swizzle  chunk c (16 bytes) of row r at c ^ (r % 8) where rows are 128 bytes, at c ^ (r / 2 % 4) where they are 64.
// Writes   results through shared memory, in the place of the stages and swizzled as they are, then 16 bytes a thread.
// Tails    n, k: the pack's squares are padded with zeros; k of x beyond K and rows beyond M are filled with zeros;
//          stores guarded. Rows of x that are not at multiples of 16 bytes are copied element by element.
// Damage   offsets are held below the number of squares, a column beyond K meets zeros, rows of squares are held below
//          their number: any bytes give some result. An order that names a row twice leaves another one unwritten.
// Bound    b 64, a stage (128 x 64 x 64): 512 clocks of the tensor cores, 576 of shared memory (24 KB written, 48 KB
//          read), 24 KB from L2 (512 clocks at 48 bytes each): about 0.85 of dense. b 32 (256 x 32 x 32): 256, 336 and
//          384 clocks: bound by L2, 0.67.
// Compiled nvcc 13.0, sm_80: 178 (b 64) and 166 registers, up to 32 rows 80 and 68, no spills; up to 73,728 bytes
// shared
//          (two thread blocks on an SM of 164 KB).
// Measured never run on hardware.
#include <stdexcept>
#include <type_traits>

#include "../../runtime/cuda/activate.h"
#include "../../runtime/cuda/device.h"
#include "holds.h"
#include "sm80.h"
#include "tiles.h"

namespace fs::sparse_matmul::sm80 {
namespace {

constexpr int kThreads = 128;
constexpr int kGroup = 16;  // row tiles that pass over the weight together
constexpr int kFewRows = 32;

// A tile of kRows rows x kB outputs; kWarpOutputs of the 4 warps lie along the outputs.
template <int kB, int kRows, int kWarpOutputs>
struct Tile {
  static constexpr int kBlock = kB, kX = kRows, kAlong = kWarpOutputs;
  static constexpr int kM = kRows / (4 / kWarpOutputs) / 16, kN = kB / kWarpOutputs / 8;  // mma tiles of a warp
  static constexpr int kRowBytes = 2 * kB, kRowChunks = kB / kChunk;
  static constexpr int kSquareBytes = kB * kRowBytes, kStageBytes = kSquareBytes + kRows * kRowBytes;
  static constexpr int kStages = kB == 64 ? 3 : 4;
  static_assert(kM >= 1 && kN % 2 == 0, "B is read 16 outputs at a time");
  static_assert(kSquareBytes % (16 * kThreads) == 0 && kRows * kRowChunks % kThreads == 0, "whole chunks a thread");
};

struct Operands {
  blocks16::Weight weight;
  const uint16_t* x;
  int64_t x_stride, m;
  bool x_vectors;  // rows of x begin at multiples of 16 bytes
  int64_t row_tiles, square_rows;
};

struct Epilogue {
  const float* bias;
  Activation activation;
  HeaderIs header;
};

template <class Shape>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  const int swizzle = Shape::kRowChunks == 8 ? row % 8 : row / 2 % 4;
  return Shape::kRowBytes * row + 16 * (chunk ^ swizzle);
}

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>)
    ptx::mma_f16(d, a, b);
  else
    ptx::mma_bf16(d, a, b);
}

// A square and the columns of x that it multiplies on their way to `stage`; what lies outside of x becomes zero.
template <class Shape>
__device__ __forceinline__ void fetch(const Operands& o, int64_t square, uint32_t column, int64_t row0,
                                      unsigned char* stage) {
  const int thread = static_cast<int>(threadIdx.x);
  const uint16_t* values = o.weight.value + square * (Shape::kBlock * Shape::kBlock);
#pragma unroll
  for (int i = thread; i < Shape::kSquareBytes / 16; i += kThreads)
    ptx::cp_async<16>(stage + chunk_offset<Shape>(i / Shape::kRowChunks, i % Shape::kRowChunks), values + i * kChunk);
  stage += Shape::kSquareBytes;
  const int chunk = thread % Shape::kRowChunks, first = thread / Shape::kRowChunks;
  const int64_t k = static_cast<int64_t>(column) * Shape::kBlock + chunk * kChunk;
  const int inside_k = static_cast<int>(max(min(o.weight.k - k, int64_t{kChunk}), int64_t{0}));
#pragma unroll
  for (int i = 0; i < Shape::kX * Shape::kRowChunks / kThreads; ++i) {
    const int row = first + i * (kThreads / Shape::kRowChunks);
    const int left = row0 + row < o.m ? inside_k : 0;
    const uint16_t* source = o.x + (left > 0 ? (row0 + row) * o.x_stride + k : 0);
    if (o.x_vectors)
      ptx::cp_async<16>(stage + chunk_offset<Shape>(row, chunk), source, 2 * left);
    else
      copy_elements(stage + chunk_offset<Shape>(row, chunk), source, left);
  }
}

// A warp's share: kM x kN tiles of 16 rows x 8 outputs.
template <class Shape>
struct Sums {
  float at[Shape::kM][Shape::kN][4];
};

// Adds the products of a stage; the warp's share begins at row, output of the tile.
template <class T, class Shape>
__device__ __forceinline__ void multiply(const unsigned char* stage, int row, int output, Sums<Shape>& sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned char* x = stage + Shape::kSquareBytes;
#pragma unroll
  for (int k = 0; k < Shape::kRowChunks; k += 2) {  // 16 k
    uint32_t a[Shape::kM][4];
#pragma unroll
    for (int m = 0; m < Shape::kM; ++m)
      ptx::ldmatrix_x4(a[m], x + chunk_offset<Shape>(row + 16 * m + lane % 16, k + lane / 16));
#pragma unroll
    for (int n = 0; n < Shape::kN; n += 2) {
      uint32_t two[4];
      ptx::ldmatrix_x4(two, stage + chunk_offset<Shape>(output + 8 * n + lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
      const uint32_t b[2][2] = {{two[0], two[1]}, {two[2], two[3]}};
#pragma unroll
      for (int m = 0; m < Shape::kM; ++m) {
        mma<T>(sums.at[m][n], a[m], b[0]);
        mma<T>(sums.at[m][n + 1], a[m], b[1]);
      }
    }
  }
}

// Two results beside each other, as one access.
template <class T>
struct alignas(4) Pair {
  T at[2];
};

// Finished results of a warp to shared memory.
template <class T, class Shape>
__device__ __forceinline__ void finish(const Epilogue& e, int64_t n, int64_t output0, int row, int output,
                                       const Sums<Shape>& sums, unsigned char* results) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float none = holds(e.header) ? -0.0f : not_a_number();
#pragma unroll
  for (int j = 0; j < Shape::kN; ++j) {
    const int column = output + 8 * j + lane % 4 * 2;
    float bias[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      bias[i] = e.bias != nullptr && output0 + column + i < n ? __fadd_rn(e.bias[output0 + column + i], none) : none;
#pragma unroll
    for (int m = 0; m < Shape::kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Pair<T> pair;
#pragma unroll
        for (int i = 0; i < 2; ++i)
          pair.at[i] = from_float<T>(activate(e.activation, __fadd_rn(sums.at[m][j][2 * half + i], bias[i])));
        const int offset = chunk_offset<Shape>(row + 16 * m + 8 * half + lane / 4, column / kChunk);
        *reinterpret_cast<Pair<T>*>(results + offset + column % kChunk * 2) = pair;
      }
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(kThreads, 2) multiply_blocks(Operands o, Epilogue e, T* y) {
  FS_DYNAMIC_SHARED(memory);
  constexpr int kStages = Shape::kStages;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int output = warp % Shape::kAlong * 8 * Shape::kN, row = warp / Shape::kAlong * 16 * Shape::kM;
  const int64_t group = blockIdx.x / (kGroup * o.square_rows), in_group = blockIdx.x % (kGroup * o.square_rows);
  const int64_t tiles = min(o.row_tiles - group * kGroup, int64_t{kGroup});
  const int64_t row0 = (group * kGroup + in_group % tiles) * Shape::kX;
  // Whatever the pack's bytes are, nothing outside of it is read.
  const auto held = [](uint32_t value, int64_t limit) { return min(static_cast<int64_t>(value), limit); };
  const int64_t square_row = held(o.weight.order[in_group / tiles], o.square_rows - 1);
  const int64_t begin = held(o.weight.offset[square_row], o.weight.stored);
  const int steps = static_cast<int>(held(o.weight.offset[square_row + 1], o.weight.stored) - begin);
  const int64_t output0 = square_row * Shape::kBlock;

  const auto stage = [&](int step) { return memory + step % kStages * Shape::kStageBytes; };
  const auto column = [&](int step) { return step < steps ? __ldg(o.weight.column + begin + step) : 0; };
  Sums<Shape> sums{};
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch<Shape>(o, begin + step, column(step), row0, stage(step));
    ptx::cp_async_commit();
  }
  uint32_t next = column(kStages - 1);  // a step ahead: the addresses of x depend on it
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage is there for all, and nobody reads the one before any more
    const int ahead = step + kStages - 1;
    if (ahead < steps) fetch<Shape>(o, begin + ahead, next, row0, stage(ahead));
    ptx::cp_async_commit();
    next = column(ahead + 1);
    multiply<T>(stage(step), row, output, sums);
  }
  __syncthreads();  // nobody reads a stage any more, and all copies have arrived
  finish<T>(e, o.weight.n, output0, row, output, sums, memory);
  __syncthreads();
  const auto chunk_at = [&](int r, int chunk) { return memory + chunk_offset<Shape>(r, chunk); };
  store_results<T, kThreads, Shape::kX, Shape::kBlock>(chunk_at, o.m, o.weight.n, row0, output0, y);
}

template <class T, class Shape>
void launch_blocks(Operands o, const Epilogue& e, void* y, cudaStream_t stream) {
  o.row_tiles = (o.m + Shape::kX - 1) / Shape::kX;
  o.square_rows = blocks16::squares(o.weight.n, Shape::kBlock);
  launch({dim3(static_cast<unsigned>(o.row_tiles * o.square_rows)), dim3(kThreads), Shape::kStages * Shape::kStageBytes,
          stream},
         multiply_blocks<T, Shape>, o, e, static_cast<T*>(y));
}

template <class T>
void linear_as(const blocks16::Weight& weight, const Rows& rows, cudaStream_t stream) {
  const auto* x = static_cast<const uint16_t*>(rows.x);
  const bool x_vectors = reinterpret_cast<uintptr_t>(x) % 16 == 0 && rows.x_stride % kChunk == 0;
  const Operands o{weight, x, rows.x_stride, rows.m, x_vectors, 0, 0};
  const Epilogue e{rows.bias, rows.activation, rows.header};
  const bool few = rows.m <= kFewRows;
  if (weight.block == blocks16::kCoarse) {
    if (few) return launch_blocks<T, Tile<64, kFewRows, 4>>(o, e, rows.y, stream);
    return launch_blocks<T, Tile<64, 128, 2>>(o, e, rows.y, stream);
  }
  if (few) return launch_blocks<T, Tile<32, kFewRows, 2>>(o, e, rows.y, stream);
  launch_blocks<T, Tile<32, 256, 1>>(o, e, rows.y, stream);
}

}  // namespace

void linear_blocks16(const blocks16::Weight& weight, const Rows& rows, void* stream) {
  if (rows.m == 0 || weight.n == 0) return;
  if (rows.dtype != weight.dtype)
    throw std::invalid_argument("sparse_linear: x must have the dtype of a blocks16 weight");
  if (reinterpret_cast<uintptr_t>(weight.value) % 16 != 0)
    throw std::invalid_argument("sparse_linear: weight must begin at a multiple of 16 bytes on CUDA; clone() it");
  auto* s = static_cast<cudaStream_t>(stream);
  if (weight.dtype == DType::f16) return linear_as<__half>(weight, rows, s);
  linear_as<__nv_bfloat16>(weight, rows, s);
}

}  // namespace fs::sparse_matmul::sm80
