// sparse_linear from nm24, CUDA sm_80: y[M,N] = act(x W^T + bias), W 2:4 sparse, all float16 or bfloat16, sums in
// float32. Idea     the sparse operand of mma.sp is its A, so the product is C^T = W x^T: 16 outputs x 8 rows of x a
// tile. Tile     128 outputs x 128 rows (32 up to 32 rows) a block of 4 warps, each 64 x 64 (32 x 32); 64 k a stage, a
// ring
//          of 3 stages by cp.async.
// Reads    kept values and x by ldmatrix; 32 words of positions (16 outputs x 64 k) are packed in the order of the
// lanes:
//          lane l reads word l, which serves both halves of the stage by mma.sp's selector.
// Swizzle  values: rows of 64 bytes, chunk c of row r at c ^ (r / 2 % 4); x: rows of 128 bytes, chunk c at c ^ (r % 8).
// Writes   results through shared memory [row][output], rows 16 bytes apart from a multiple of 128 so that neither
//          side meets in a bank, then 16 bytes a thread.
// Tails    k: padded by the pack with zeros, x is filled with zeros; m, n: zeros, guarded stores. Positions beyond
//          the pack's rows are those of its last block: mma.sp wants them in order. Rows of x that are not at multiples
//          of 16 bytes are copied element by element. Positions out of order (a pack that did not pass validate()) give
//          wrong numbers.
// Bound    a warp's 32 k: 32 mma.sp (256 clocks of a tensor core), 6 KB from shared memory (4 warps: 192 clocks).
// Compiled nvcc 13.0, sm_80: 252 registers (128 rows), 138 (32 rows), no spills; 76,800 and 39,936 bytes shared.
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
constexpr int kStages = 3;
constexpr int kStageK = 64;
constexpr int kOutputs = 128;  // of a block
constexpr int kFewRows = 32;
constexpr int kValueBytes = kOutputs * kStageK / 2 * 2;
constexpr int kPositionBytes = kOutputs * kStageK / 8;
constexpr int kPitch = kOutputs + kChunk;  // elements between rows of results
static_assert(kStageK == nm24::kColumns, "a stage is a block of positions");

template <int kRows>
constexpr int kStageBytes = kValueBytes + kPositionBytes + kRows * kStageK * 2;

struct Operands {
  nm24::Weight weight;
  const uint16_t* x;
  int64_t x_stride, m;
  bool x_vectors;              // rows of x begin at multiples of 16 bytes
  int64_t padded_n, padded_k;  // of the weight
  int64_t row_blocks;
  int steps;  // stages of k
};

struct Epilogue {
  const float* bias;
  Activation activation;
  HeaderIs header;
};

__device__ __forceinline__ int value_offset(int row, int chunk) { return 64 * row + 16 * (chunk ^ (row / 2 % 4)); }
__device__ __forceinline__ int x_offset(int row, int chunk) { return 128 * row + 16 * (chunk ^ (row % 8)); }

template <class T, int kSelector>
__device__ __forceinline__ void mma_sp(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                       uint32_t positions) {
  if constexpr (std::is_same_v<T, __half>)
    ptx::mma_sp_f16<kSelector>(d, a, b, positions);
  else
    ptx::mma_sp_bf16<kSelector>(d, a, b, positions);
}

// Stage number `step` of both operands on its way to `stage`; what lies outside of them becomes zero.
template <int kRows>
__device__ __forceinline__ void fetch(const Operands& o, int64_t output0, int64_t row0, int step,
                                      unsigned char* stage) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = thread; i < kValueBytes / 16; i += kThreads) {
    const int row = i / 4, chunk = i % 4;
    const bool inside = output0 + row < o.padded_n;
    const uint16_t* source =
        o.weight.value + (inside ? (output0 + row) * (o.padded_k / 2) + step * kStageK / 2 + chunk * kChunk : 0);
    ptx::cp_async<16>(stage + value_offset(row, chunk), source, inside ? 16 : 0);
  }
  stage += kValueBytes;
  if (thread < kPositionBytes / 16) {
    const int64_t block = min(output0 / nm24::kRows + thread / 8, o.padded_n / nm24::kRows - 1);
    ptx::cp_async<16>(stage + 16 * thread, o.weight.position + (block * o.steps + step) * 32 + thread % 8 * 4);
  }
  stage += kPositionBytes;
#pragma unroll
  for (int i = thread; i < kRows * 8; i += kThreads) {
    const int row = i / 8, chunk = i % 8;
    const int64_t k = static_cast<int64_t>(step) * kStageK + chunk * kChunk;
    const int left = row0 + row < o.m ? static_cast<int>(max(min(o.weight.k - k, int64_t{kChunk}), int64_t{0})) : 0;
    const uint16_t* source = o.x + (left > 0 ? (row0 + row) * o.x_stride + k : 0);
    if (o.x_vectors)
      ptx::cp_async<16>(stage + x_offset(row, chunk), source, 2 * left);
    else
      copy_elements(stage + x_offset(row, chunk), source, left);
  }
}

// A warp's share of C^T: kM x kN tiles of 16 outputs x 8 rows.
template <int kM, int kN>
struct Sums {
  float at[kM][kN][4];
};

// Adds the products of half a stage, 32 k; the warp's share begins at output, row of the tile.
template <class T, int kHalf, int kM, int kN>
__device__ __forceinline__ void multiply_half(const unsigned char* stage, const uint32_t (&positions)[kM], int output,
                                              int row, Sums<kM, kN>& sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned char* x = stage + kValueBytes + kPositionBytes;
  uint32_t a[kM][4];
#pragma unroll
  for (int m = 0; m < kM; ++m)
    ptx::ldmatrix_x4(a[m], stage + value_offset(output + 16 * m + lane % 16, 2 * kHalf + lane / 16));
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    uint32_t b[4];
    ptx::ldmatrix_x4(b, x + x_offset(row + 8 * n + lane % 8, 4 * kHalf + lane / 8));
#pragma unroll
    for (int m = 0; m < kM; ++m) mma_sp<T, kHalf>(sums.at[m][n], a[m], b, positions[m]);
  }
}

template <class T, int kM, int kN>
__device__ __forceinline__ void multiply_stage(const unsigned char* stage, int output, int row, Sums<kM, kN>& sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t positions[kM];
#pragma unroll
  for (int m = 0; m < kM; ++m)
    positions[m] = *reinterpret_cast<const uint32_t*>(stage + kValueBytes + 128 * (output / 16 + m) + 4 * lane);
  multiply_half<T, 0>(stage, positions, output, row, sums);
  multiply_half<T, 1>(stage, positions, output, row, sums);
}

// Finished results of a warp to shared memory.
template <class T, int kM, int kN>
__device__ __forceinline__ void finish(const Epilogue& e, int64_t n, int64_t output0, int output, int row,
                                       const Sums<kM, kN>& sums, T* results) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float none = holds(e.header) ? -0.0f : not_a_number();
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = output + 16 * m + 8 * half + lane / 4;
      const float bias = e.bias != nullptr && output0 + column < n ? __fadd_rn(e.bias[output0 + column], none) : none;
#pragma unroll
      for (int i = 0; i < 2 * kN; ++i) {
        const int r = row + i / 2 * 8 + lane % 4 * 2 + i % 2;
        results[r * kPitch + column] =
            from_float<T>(activate(e.activation, __fadd_rn(sums.at[m][i / 2][2 * half + i % 2], bias)));
      }
    }
}

// kOutputs x kRows of C^T; kWarpOutputs of the 4 warps lie along the outputs.
template <class T, int kRows, int kWarpOutputs>
__global__ void __launch_bounds__(kThreads, 2) multiply_sparse(Operands o, Epilogue e, T* y) {
  FS_DYNAMIC_SHARED(memory);
  constexpr int kM = kOutputs / kWarpOutputs / 16, kN = kRows / (4 / kWarpOutputs) / 8;
  static_assert(kRows * kPitch * 2 <= kStages * kStageBytes<kRows>, "results take the place of the stages");
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int output = warp % kWarpOutputs * 16 * kM, row = warp / kWarpOutputs * 8 * kN;
  const int64_t output0 = blockIdx.x / o.row_blocks * kOutputs, row0 = blockIdx.x % o.row_blocks * kRows;
  const auto stage = [&](int step) { return memory + step % kStages * kStageBytes<kRows>; };
  Sums<kM, kN> sums{};
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < o.steps) fetch<kRows>(o, output0, row0, step, stage(step));
    ptx::cp_async_commit();
  }
  for (int step = 0; step < o.steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage is there for all, and nobody reads the one before any more
    if (step + kStages - 1 < o.steps) fetch<kRows>(o, output0, row0, step + kStages - 1, stage(step + kStages - 1));
    ptx::cp_async_commit();
    multiply_stage<T>(stage(step), output, row, sums);
  }
  __syncthreads();  // nobody reads a stage any more, and all copies have arrived
  T* results = reinterpret_cast<T*>(memory);
  finish(e, o.weight.n, output0, output, row, sums, results);
  __syncthreads();
  const auto chunk_at = [&](int r, int chunk) { return results + r * kPitch + chunk * kChunk; };
  store_results<T, kThreads, kRows, kOutputs>(chunk_at, o.m, o.weight.n, row0, output0, y);
}

template <class T, int kRows, int kWarpOutputs>
void launch_sparse(Operands o, const Epilogue& e, void* y, cudaStream_t stream) {
  o.row_blocks = (o.m + kRows - 1) / kRows;
  const int64_t blocks = (o.weight.n + kOutputs - 1) / kOutputs * o.row_blocks;
  launch({dim3(static_cast<unsigned>(blocks)), dim3(kThreads), kStages * kStageBytes<kRows>, stream},
         multiply_sparse<T, kRows, kWarpOutputs>, o, e, static_cast<T*>(y));
}

template <class T>
void linear_as(const nm24::Weight& weight, const Rows& rows, cudaStream_t stream) {
  const auto* x = static_cast<const uint16_t*>(rows.x);
  const Operands o{weight,
                   x,
                   rows.x_stride,
                   rows.m,
                   reinterpret_cast<uintptr_t>(x) % 16 == 0 && rows.x_stride % kChunk == 0,
                   nm24::padded_n(weight.n),
                   nm24::padded_k(weight.k),
                   0,
                   static_cast<int>(nm24::padded_k(weight.k) / kStageK)};
  const Epilogue e{rows.bias, rows.activation, rows.header};
  if (rows.m <= kFewRows)
    launch_sparse<T, kFewRows, 4>(o, e, rows.y, stream);
  else
    launch_sparse<T, 128, 2>(o, e, rows.y, stream);
}

}  // namespace

void linear_nm24(const nm24::Weight& weight, const Rows& rows, void* stream) {
  if (rows.m == 0 || weight.n == 0) return;
  if (rows.dtype != weight.dtype) throw std::invalid_argument("sparse_linear: x must have the dtype of an nm24 weight");
  if (reinterpret_cast<uintptr_t>(weight.value) % 16 != 0)
    throw std::invalid_argument("sparse_linear: weight must begin at a multiple of 16 bytes on CUDA; clone() it");
  auto* s = static_cast<cudaStream_t>(stream);
  if (weight.dtype == DType::f16) return linear_as<__half>(weight, rows, s);
  linear_as<__nv_bfloat16>(weight, rows, s);
}

}  // namespace fs::sparse_matmul::sm80
