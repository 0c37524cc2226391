// int8_linear, CUDA sm_80: y[M,N] = act(x_q W^T * x_scale * weight_scale + bias), the integer sums exact.
// Idea     two kernels: rows of x to s8 and a scale each (as qdq), then tiles of C on the tensor cores (mma s8).
// Tile     128 x 128 of C (32 x 128 up to 32 rows) a block of 8 warps; 64 k a stage, a ring of 4 stages by cp.async.
// Reads    A by ldmatrix. B is vnni16 as it is packed for every device: the 4 k of one column are one word, which is
//          what a register of mma's B wants, so plain 4-byte loads read it; no layout of its own for CUDA.
// Swizzle  A: rows of 64 bytes, chunk c of row r lies at c ^ (r / 2 % 4). B: rows of 16 bytes * 32 (one word of k for
// 128
//          columns), chunk c of row k lies at c ^ {0, 4, 2, 6}[k % 4]. Then neither reads nor writes meet in a bank.
// Tails    m, n, k: cp.async fills with zeros what is not there; codes are zero-padded to 64 k; guarded stores.
// Bound    per warp and 32 k: 16 mma (128 clocks of a tensor core), 3 KB from shared memory (24 of the SM's clocks).
// Measured never run on hardware.
#include "sm80.h"

#include <stdexcept>

#include "../../qdq/cuda/rows.h"
#include "../../runtime/cuda/activate.h"
#include "../../runtime/cuda/device.h"
#include "../formats/vnni16.h"

namespace fs::int8_gemm::sm80 {
namespace {

namespace rows = fs::qdq::sm80;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStages = 4;
constexpr int kStageK = 64;
constexpr int kStageWords = kStageK / 4;  // words of 4 k
constexpr int kColumns = 128;             // of C a block
constexpr int kFewRows = 32;

__host__ __device__ __forceinline__ int64_t padded(int64_t k) { return (k + kStageK - 1) / kStageK * kStageK; }

// --- Rows of x to codes ----------------------------------------------------------------------------------------------

// One block a row: the codes of x, zero-padded to padded(k), and the row's scale. int8_gemm.h gives the formulas.
template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_rows(const T* x, int64_t x_stride, int64_t k, bool dynamic, float static_scale, int32_t zero_point,
                  int8_t* codes, float* scales) {
  FS_SHARED(unsigned, warp_max, [kWarps]);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x;
  x += row * x_stride;
  codes += row * padded(k);
  float scale = static_scale;
  if (dynamic) {
    unsigned absmax = rows::max_of_warp(rows::absmax_bits(x, k, thread, kThreads));
    if (thread % 32 == 0) warp_max[thread / 32] = absmax;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) absmax = max(absmax, warp_max[w]);
    scale = rows::row_scale(absmax);
  }
  const bool finite = scale == scale, vectors = is_aligned(x, 16);
  const float inverse = __fdiv_rn(1.0f, scale);
  for (int64_t i = static_cast<int64_t>(thread) * rows::kGroup; i < padded(k);
       i += static_cast<int64_t>(kThreads) * rows::kGroup) {
    const int count = i < k ? rows::group_count(k - i) : 0;
    float v[rows::kGroup];
    int q[rows::kGroup];
    rows::load_group(x + i, count, vectors && count == rows::kGroup, v);
#pragma unroll
    for (int j = 0; j < rows::kGroup; ++j) {
      const int code = dynamic ? rows::dynamic_code(v[j], inverse) : rows::static_code(v[j], inverse, zero_point);
      q[j] = j < count && finite ? max(-128, min(127, code)) : 0;
    }
    rows::store_codes(codes + i, rows::kGroup, true, q);
  }
  if (thread == 0) scales[row] = scale;
}

// --- The product -----------------------------------------------------------------------------------------------------

struct Operands {
  const int8_t* codes;   // [m][row_bytes], row_bytes a multiple of kStageK
  const int8_t* weight;  // vnni16: [n_padded / 16][weight_words][16][4]
  int64_t m, n, row_bytes, n_padded;
  int weight_words, steps;  // steps: stages of k
};

struct Epilogue {
  const float* x_scale;
  const float* weight_scale;
  const float* bias;
  const int32_t* column_sum;
  int32_t zero_point;
  Activation activation;
};

template <int kRows>
constexpr int kStageBytes = (kRows + kColumns) * kStageK;

__device__ __forceinline__ int a_offset(int row, int chunk) { return kStageK * row + 16 * (chunk ^ (row / 2 % 4)); }
__device__ __forceinline__ int b_offset(int word, int chunk) {
  return 4 * kColumns * word + 16 * (chunk ^ (word % 2 * 4 + word / 2 % 2 * 2));
}

// Stage number `step` of both operands on its way to `stage`; what lies outside of them becomes zero.
template <int kRows>
__device__ __forceinline__ void fetch(const Operands& o, int64_t row0, int64_t column0, int step,
                                      unsigned char* stage) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = thread; i < kRows * kStageK / 16; i += kThreads) {
    const int row = i / (kStageK / 16), chunk = i % (kStageK / 16);
    const bool inside = row0 + row < o.m;
    const int8_t* source = o.codes + (inside ? (row0 + row) * o.row_bytes + step * kStageK + 16 * chunk : 0);
    ptx::cp_async<16>(stage + a_offset(row, chunk), source, inside ? 16 : 0);
  }
  stage += kRows * kStageK;
#pragma unroll
  for (int i = thread; i < kStageWords * kColumns / 4; i += kThreads) {  // along the panels of 16 columns
    const int panel = i / (4 * kStageWords), word = i / 4 % kStageWords, quarter = i % 4;
    const int64_t column = column0 + 16 * panel;
    const int w = step * kStageWords + word;
    const bool inside = column < o.n_padded && w < o.weight_words;
    const int8_t* source = o.weight + (inside ? (column / 16 * o.weight_words + w) * 64 + 16 * quarter : 0);
    ptx::cp_async<16>(stage + b_offset(word, 4 * panel + quarter), source, inside ? 16 : 0);
  }
}

// A warp's share of C: kM x kN tiles of 16 x 8.
template <int kM, int kN>
struct Sums {
  int32_t at[kM][kN][4];
};

// Adds the products of one stage; the warp's share begins at row, column of the tile.
template <int kRows, int kM, int kN>
__device__ __forceinline__ void multiply_stage(const unsigned char* stage, int row, int column, Sums<kM, kN>& sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // Where this lane reads: 16 rows further, or 4 words of k, the swizzle is the same, so that the rest is constants.
  int a_at[kStageK / 32], b_at[kN];
#pragma unroll
  for (int j = 0; j < kStageK / 32; ++j) a_at[j] = a_offset(row + lane % 16, 2 * j + lane / 16);
#pragma unroll
  for (int n = 0; n < kN; ++n)
    b_at[n] = kRows * kStageK + b_offset(lane % 4, (column + 8 * n + lane / 4) / 4) + 4 * (lane / 4 % 4);
#pragma unroll
  for (int j = 0; j < kStageK / 32; ++j) {
    uint32_t b[kN][2];
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        b[n][i] = *reinterpret_cast<const uint32_t*>(stage + b_at[n] + 4 * kColumns * (8 * j + 4 * i));
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, stage + a_at[j] + 16 * kStageK * m);
#pragma unroll
      for (int n = 0; n < kN; ++n) ptx::mma_s8(sums.at[m][n], a, b[n]);
    }
  }
}

// What a column of C multiplies and adds.
struct Column {
  float scale, bias;
  int32_t sum;  // what the zero point adds to each of its sums
};

__device__ __forceinline__ Column column_of(const Epilogue& e, int64_t column, bool inside) {
  if (!inside) return {0.0f, 0.0f, 0};
  return {e.weight_scale[column], e.bias == nullptr ? -0.0f : e.bias[column], e.zero_point * e.column_sum[column]};
}

__device__ __forceinline__ float result(const Epilogue& e, int32_t sum, float x_scale, const Column& c) {
  const float y = __fmaf_rn(static_cast<float>(sum - c.sum), __fmul_rn(x_scale, c.scale), c.bias);
  return activate(e.activation, y);
}

// Two columns beside each other, as one store where that is allowed.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

template <class T, int kM, int kN>
__device__ __forceinline__ void store(const Operands& o, const Epilogue& e, int64_t row0, int64_t column0,
                                      const Sums<kM, kN>& sums, T* y) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool pairs = o.n % 2 == 0 && is_aligned(y, sizeof(Pair<T>));
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const int64_t column = column0 + 8 * n + lane % 4 * 2;
    if (column >= o.n) continue;
    const bool two = column + 1 < o.n;
    const Column first = column_of(e, column, true), second = column_of(e, column + 1, two);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = row0 + 16 * m + lane / 4 + 8 * half;
        if (row >= o.m) continue;
        const float x_scale = e.x_scale[row];
        const Pair<T> values = {from_float<T>(result(e, sums.at[m][n][2 * half], x_scale, first)),
                                from_float<T>(result(e, sums.at[m][n][2 * half + 1], x_scale, second))};
        T* p = y + row * o.n + column;
        if (pairs) {
          *reinterpret_cast<Pair<T>*>(p) = values;
        } else {
          p[0] = values.first;
          if (two) p[1] = values.second;
        }
      }
  }
}

// kRows x kColumns of C; kWarpRows of the 8 warps lie below each other.
template <class T, int kRows, int kWarpRows>
__global__ void __launch_bounds__(kThreads, 2) multiply(Operands o, Epilogue e, T* y) {
  FS_DYNAMIC_SHARED(memory);
  constexpr int kM = kRows / kWarpRows / 16, kN = kColumns / (kWarps / kWarpRows) / 8;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int row = warp % kWarpRows * 16 * kM, column = warp / kWarpRows * 8 * kN;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows, column0 = static_cast<int64_t>(blockIdx.y) * kColumns;
  const auto stage = [&](int step) { return memory + step % kStages * kStageBytes<kRows>; };
  Sums<kM, kN> sums{};
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < o.steps) fetch<kRows>(o, row0, column0, step, stage(step));
    ptx::cp_async_commit();
  }
  for (int step = 0; step < o.steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage is there for all, and nobody reads the one before any more
    if (step + kStages - 1 < o.steps) fetch<kRows>(o, row0, column0, step + kStages - 1, stage(step + kStages - 1));
    ptx::cp_async_commit();
    multiply_stage<kRows>(stage(step), row, column, sums);
  }
  store(o, e, row0 + row, column0 + column, sums, y);
}

template <class T, int kRows, int kWarpRows>
void launch_multiply(const Operands& o, const Epilogue& e, void* y, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((o.m + kRows - 1) / kRows),
                  static_cast<unsigned>((o.n + kColumns - 1) / kColumns));
  launch({grid, dim3(kThreads), kStages * kStageBytes<kRows>, stream}, multiply<T, kRows, kWarpRows>, o, e,
         static_cast<T*>(y));
}

template <class T>
void linear_as(const LinearArgs& a, uint8_t* scratch, cudaStream_t stream) {
  auto* codes = reinterpret_cast<int8_t*>(scratch);
  auto* scales = reinterpret_cast<float*>(scratch + a.m * padded(a.k));  // padded(k) is a multiple of 64
  launch({dim3(static_cast<unsigned>(a.m)), dim3(kThreads), 0, stream}, quantize_rows<T>, static_cast<const T*>(a.x),
         a.x_stride, a.k, a.dynamic, a.x_scale, a.x_zero_point, codes, scales);
  const Operands o{codes,
                   vnni16::weights(a.weight),
                   a.m,
                   a.n,
                   padded(a.k),
                   vnni16::padded_n(a.n),
                   static_cast<int>(vnni16::padded_k(a.k) / 4),
                   static_cast<int>(padded(a.k) / kStageK)};
  const Epilogue e{
      scales,      a.weight_scale, a.bias, vnni16::column_sums(a.weight, a.n, a.k), a.dynamic ? 0 : a.x_zero_point,
      a.activation};
  if (a.m <= kFewRows)
    launch_multiply<T, kFewRows, 1>(o, e, a.y, stream);
  else
    launch_multiply<T, 128, 2>(o, e, a.y, stream);
}

}  // namespace

int64_t scratch_bytes(int64_t m, int64_t k) { return m * (padded(k) + static_cast<int64_t>(sizeof(float))); }

void linear(const LinearArgs& args, uint8_t* scratch, void* stream) {
  if (args.m == 0 || args.n == 0) return;
  if (reinterpret_cast<uintptr_t>(args.weight) % 16 != 0)
    throw std::invalid_argument("int8_linear: weight must begin at a multiple of 16 bytes on CUDA; clone() it");
  auto* s = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::f32: return linear_as<float>(args, scratch, s);
    case DType::bf16: return linear_as<__nv_bfloat16>(args, scratch, s);
    case DType::f16: return linear_as<__half>(args, scratch, s);
  }
}

}  // namespace fs::int8_gemm::sm80
