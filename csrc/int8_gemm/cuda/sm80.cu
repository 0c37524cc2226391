// int8_linear, CUDA sm_80: y[M,N] = act(x_q W^T * x_scale * weight_scale + bias + residual), the integer sums exact.
// Idea     two kernels: rows of x to s8 and a scale each (as qdq; int8 x is read where it is), then tiles of C on the
//          tensor cores (mma s8). The sums of a tile pass through shared memory, so that the epilogue goes along rows:
//          residual, y and scales by 4 columns a lane, a row a warp.
// Tile     128 x 128 of C a block of 8 warps (32 x 128 up to 32 rows): 64 k a stage, a ring of 4 stages by cp.async.
//          Up to 16 rows: 32 columns a block, K split over the 8 warps, weights straight to registers (few_rows.h).
// Reads    A by ldmatrix. B is vnni16 as it is packed for every device: the 4 k of one column are one word, which is
//          what a register of mma's B wants, so plain 4-byte loads read it; no layout of its own for CUDA.
// Swizzle  A: rows of 64 bytes, chunk c of row r lies at c ^ (r / 2 % 4). B: rows of 512 bytes (one word of k for 128
//          columns), chunk c of row k lies at c ^ {0, 4, 2, 6}[k % 4]. Then neither reads nor writes meet in a bank.
// Tails    m, n, k: cp.async fills with zeros what is not there; codes are zero-padded to 64 k; guarded stores.
// Bound    128 x 128: per warp and 32 k 16 mma (128 clocks of a tensor core), 3 KB from shared memory (24 of the SM's
//          clocks). Few rows: DRAM; per block and turn of 128 k a warp has 4 KB of weights under way, 64 KB an SM with
//          two blocks; codes come from L2, M / 32 bytes a byte of weight.
// Open     few rows: N = 768 is 24 blocks, K split over blocks, too, would fill the GPU; the quantization is a launch
//          of its own.
// Measured never run on hardware.
#include "sm80.h"

#include <stdexcept>

#include "../formats/vnni16.h"
#include "epilogue.h"
#include "few_rows.h"

namespace fs::int8_gemm::sm80 {
namespace {

namespace rows = fs::qdq::sm80;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStages = 4;
constexpr int kStageK = 64;
constexpr int kStageWords = kStageK / 4;  // words of 4 k
constexpr int kColumns = 128;             // of C a block
constexpr int kLowRows = 32;              // up to so many, low tiles
constexpr int kFewRows = 16;              // up to so many, no tiles
constexpr int kPitch = 136;  // words between rows of sums: 8 rows of 8 bytes then fall into different banks

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

// One block a row: codes that do not lie as the product reads them.
__global__ void __launch_bounds__(kThreads) copy_codes(const int8_t* x, int64_t x_stride, int64_t k, int8_t* codes) {
  x += blockIdx.x * x_stride;
  codes += blockIdx.x * padded(k);
  for (int64_t i = threadIdx.x; i < padded(k); i += kThreads) codes[i] = i < k ? x[i] : static_cast<int8_t>(0);
}

// --- The product -----------------------------------------------------------------------------------------------------

struct Operands {
  const int8_t* codes;  // [m], rows row_stride bytes apart, of which code_bytes count; both multiples of 16
  int64_t row_stride, code_bytes;
  const int8_t* weight;  // vnni16: [n_padded / 16][weight_words][16][4]
  int64_t m, n_padded;
  int weight_words, steps;  // steps: stages of k
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
    const int64_t k = static_cast<int64_t>(step) * kStageK + 16 * chunk;
    const bool inside = row0 + row < o.m && k < o.code_bytes;
    const int8_t* source = o.codes + (inside ? (row0 + row) * o.row_stride + k : 0);
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

// The warp's sums to shared memory, rows kPitch words apart.
template <int kM, int kN>
__device__ __forceinline__ void store_sums(const Sums<kM, kN>& sums, int row, int column, int32_t* results) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < kN; ++n)
        ptx::store8(results + (row + 16 * m + 8 * half + lane / 4) * kPitch + column + 8 * n + lane % 4 * 2,
                    make_uint2(static_cast<unsigned>(sums.at[m][n][2 * half]),
                               static_cast<unsigned>(sums.at[m][n][2 * half + 1])));
}

template <int kRows>
constexpr int kSharedBytes =
    kStages * kStageBytes<kRows> > 4 * kRows* kPitch ? kStages * kStageBytes<kRows> : 4 * kRows * kPitch;

// kRows x kColumns of C; kWarpRows of the 8 warps lie below each other.
template <int kRows, int kWarpRows>
__global__ void __launch_bounds__(kThreads, 2) multiply(Operands o, Epilogue e) {
  FS_DYNAMIC_SHARED(memory);
  constexpr int kM = kRows / kWarpRows / 16, kN = kColumns / (kWarps / kWarpRows) / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
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
  __syncthreads();  // nobody reads a stage any more, and all copies have arrived
  auto* results = reinterpret_cast<int32_t*>(memory);
  store_sums(sums, row, column, results);
  __syncthreads();
  const int64_t mine = column0 + 4 * lane;
  if (mine >= e.n) return;
  const Columns c = columns_of(e, mine);
  for (int r = warp; r < kRows && row0 + r < o.m; r += kWarps)
    finish(e, c, row0 + r, mine, ptx::load16(results + r * kPitch + 4 * lane));
}

// Up to 8 * kTiles rows x kFewColumns of C. Turns of kTurnK go round the warps; integers can be added in any order.
template <int kTiles>
__global__ void __launch_bounds__(kThreads, 2) multiply_few(Operands o, Epilogue e) {
  FS_SHARED(int32_t, rows, [kWarps][8 * kTiles][kFewPitch]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t panel = int64_t{blockIdx.x} * (kFewColumns / 16) + lane / 16;
  const bool there = 16 * panel < o.n_padded;
  const auto* at = reinterpret_cast<const uint8_t*>(o.weight) + (there ? panel * o.weight_words * 64 : 0);
  const S8Weights weights{at + lane / 4 % 4 * 16, there ? o.weight_words : 0};
  const Codes<kTiles> codes = codes_of<kTiles>(o.codes, o.m, o.row_stride, o.code_bytes);
  const int turns = (o.steps * kStageK + kTurnK - 1) / kTurnK;
  FewSums<int32_t, kTiles> sums{};
  Turn<S8Weights> next;
  if (warp < turns) next.load(weights, warp);
  for (int turn = warp; turn < turns; turn += kWarps) {
    const Turn<S8Weights> now = next;
    TurnCodes<kTiles> x;
    x.load(codes, turn);
    if (turn + kWarps < turns) next.load(weights, turn + kWarps);
#pragma unroll
    for (int step = 0; step < kTurnSteps; ++step) multiply_step(now, x, step, sums);
  }
  store_sums(sums, rows[warp]);
  __syncthreads();
  const int row = thread / (kFewColumns / 4), first = thread % (kFewColumns / 4) * 4;
  const int64_t column = int64_t{blockIdx.x} * kFewColumns + first;
  if (row >= 8 * kTiles || row >= o.m || column >= e.n) return;
  uint4 sum = ptx::load16(&rows[0][row][first]);
  for (int w = 1; w < kWarps; ++w) {
    const uint4 other = ptx::load16(&rows[w][row][first]);
    sum = make_uint4(sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w);
  }
  finish(e, columns_of(e, column), row, column, sum);
}

template <int kRows, int kWarpRows>
void launch_multiply(const Operands& o, const Epilogue& e, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((o.m + kRows - 1) / kRows),
                  static_cast<unsigned>((e.n + kColumns - 1) / kColumns));
  launch({grid, dim3(kThreads), kSharedBytes<kRows>, stream}, multiply<kRows, kWarpRows>, o, e);
}

template <int kTiles>
void launch_few(const Operands& o, const Epilogue& e, cudaStream_t stream) {
  static_assert(8 * kTiles <= kFewRows);
  const dim3 grid(static_cast<unsigned>((e.n + kFewColumns - 1) / kFewColumns));
  launch({grid, dim3(kThreads), 0, stream}, multiply_few<kTiles>, o, e);
}

template <class T>
void quantize_as(const LinearArgs& a, int8_t* codes, float* scales, cudaStream_t stream) {
  launch({dim3(static_cast<unsigned>(a.m)), dim3(kThreads), 0, stream}, quantize_rows<T>, static_cast<const T*>(a.x),
         a.x_stride, a.k, a.dynamic, a.x_scale, a.x_zero_point, codes, scales);
}

// Can codes be read where they are, by 16 bytes?
bool reads_in_place(const LinearArgs& a) {
  return a.x_codes && reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && a.x_stride % 16 == 0 && a.k % 16 == 0;
}

}  // namespace

int64_t scratch_bytes(int64_t m, int64_t k) { return m * (padded(k) + static_cast<int64_t>(sizeof(float))); }

void linear(const LinearArgs& a, uint8_t* scratch, void* stream) {
  if (a.m == 0 || a.n == 0) return;
  if (reinterpret_cast<uintptr_t>(a.weight) % 16 != 0)
    throw std::invalid_argument("int8_linear: weight must begin at a multiple of 16 bytes on CUDA; clone() it");
  auto* s = static_cast<cudaStream_t>(stream);
  auto* codes = reinterpret_cast<int8_t*>(scratch);
  auto* scales = reinterpret_cast<float*>(scratch + a.m * padded(a.k));  // padded(k) is a multiple of 64
  Operands o{codes,
             padded(a.k),
             padded(a.k),
             vnni16::weights(a.weight),
             a.m,
             vnni16::padded_n(a.n),
             static_cast<int>(vnni16::padded_k(a.k) / 4),
             static_cast<int>(padded(a.k) / kStageK)};
  if (reads_in_place(a)) {
    o.codes = static_cast<const int8_t*>(a.x);
    o.row_stride = a.x_stride;
    o.code_bytes = a.k;
  } else if (a.x_codes) {
    launch({dim3(static_cast<unsigned>(a.m)), dim3(kThreads), 0, s}, copy_codes, static_cast<const int8_t*>(a.x),
           a.x_stride, a.k, codes);
  } else {
    switch (a.dtype) {
      case DType::f32: quantize_as<float>(a, codes, scales, s); break;
      case DType::bf16: quantize_as<__nv_bfloat16>(a, codes, scales, s); break;
      case DType::f16: quantize_as<__half>(a, codes, scales, s); break;
    }
  }
  const bool dynamic = !a.x_codes && a.dynamic;
  const Epilogue e{a.x_codes ? a.x_scales : scales,
                   a.x_scale,
                   a.weight_scale,
                   a.bias,
                   vnni16::column_sums(a.weight, a.n, a.k),
                   dynamic ? 0 : a.x_zero_point,
                   a.activation,
                   a.residual,
                   a.residual_stride,
                   a.y,
                   a.n,
                   a.y_dtype,
                   a.requantize,
                   a.requantize ? 1.0f / a.y_scale : 1.0f,
                   a.y_zero_point};
  if (a.m <= 8)
    launch_few<1>(o, e, s);
  else if (a.m <= kFewRows)
    launch_few<2>(o, e, s);
  else if (a.m <= kLowRows)
    launch_multiply<kLowRows, 1>(o, e, s);
  else
    launch_multiply<128, 2>(o, e, s);
}

}  // namespace fs::int8_gemm::sm80
