// weight_only_linear, CUDA sm_80: y[M,N] = act(sum over groups of isum * x_scale * w_scale + bias), weights of 4 bits
// in groups of 32, 64 or 128 k (u4) or of 8 bits per column (vnni16, groups of 128); isum is exact, x has 8 bits and a
// scale for each row and group. Idea     two kernels: x to codes, scales and sums of codes by groups; then the product
// of few_rows.h, whose integer
//          sums of a group are scaled and added in float32.
// Work     a block of 8 warps takes 32 columns and up to 16 rows; K is split over the warps in turns of 128 k, so that
// a
//          warp meets its groups in ascending order; the warps' sums are added in their order, then the bias. Bits
//          depend neither on M nor on the launch; they are the CPU's up to K = 128, beyond within the same bound of
//          error.
// Reads    weights: 16 bytes a load, each once. u4: two ANDs and a shift make two operands of mma of a word; zero
// points
//          come off afterwards, isum - zero * (sum of x's codes), as integers.
// Tails    k: codes of x are zero there; n, m: guarded, as few_rows.h says. The kernels read the group's size from the
//          header of the pack, which lies in device memory.
// Bound    DRAM: 4 + 16/G bits a weight. u4, G = 32, 8 rows: 16 bytes of weights a lane cost about 10 operations to
//          unpack, 2 mma and 32 for the group's 8 sums; per SM that is a third of what it can issue at 3 TB/s.
// Measured never run on hardware.
#include <stdexcept>

#include "../../runtime/pack.h"
#include "../formats/u4.h"
#include "../formats/vnni16.h"
#include "epilogue.h"
#include "few_rows.h"
#include "sm80.h"

namespace fs::int8_gemm::sm80 {
namespace {

namespace qdq_rows = fs::qdq::sm80;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kGroupS8 = 128;
constexpr int kSmallestGroup = 32;
constexpr int kDigits = kTurnK / 32;  // of a row that a lane quantizes
static_assert(kDigits == 4);

__host__ __device__ __forceinline__ int64_t padded(int64_t k) { return (k + kTurnK - 1) / kTurnK * kTurnK; }

// x by groups: rows of codes, then scales and sums of codes, [block of rows][group][row].
struct Quantized {
  int8_t* codes;  // [m][padded(k)]
  float* scale;
  int32_t* sum;
};

struct Task {
  const void* x;
  int64_t x_stride, m, n, k;
  Quantized q;
  const uint8_t* pack;
  const float* weight_scale;  // [n] of an s8 pack, or null: u4
  const float* bias;
  Activation activation;
  void* y;
  DType dtype;
};

// Of a pack in device memory.
__device__ __forceinline__ int group_of(const Task& t) {
  return t.weight_scale != nullptr ? kGroupS8 : static_cast<int>(reinterpret_cast<const PackHeader*>(t.pack)->block);
}

// A warp takes kTurnK of a row, also of the rows beyond m in the last block of kRows: their scales are zero.
template <class T, int kRows>
__global__ void __launch_bounds__(kThreads) quantize_groups(Task t) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t row = blockIdx.x, first = (int64_t{blockIdx.y} * kWarps + warp) * kTurnK;
  if (first >= padded(t.k)) return;
  const int group = group_of(t), lanes = group / kDigits;
  const int64_t groups = (t.k + group - 1) / group, k = first + kDigits * lane;
  const T* x = static_cast<const T*>(t.x) + row * t.x_stride;
  const int count = row < t.m ? static_cast<int>(max(min(t.k - k, int64_t{kDigits}), int64_t{0})) : 0;
  float v[kDigits];
  load_four(x + k, count, v);
  unsigned absmax = 0;
#pragma unroll
  for (int i = 0; i < kDigits; ++i) absmax = max(absmax, qdq_rows::abs_bits(v[i]));
  for (int step = 1; step < lanes; step *= 2) absmax = max(absmax, __shfl_xor_sync(qdq_rows::kAllLanes, absmax, step));
  const float scale = qdq_rows::row_scale(absmax), inverse = __fdiv_rn(1.0f, scale);
  const bool finite = scale == scale;
  uint32_t packed = 0;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kDigits; ++i) {
    const int code = finite ? max(-128, min(127, qdq_rows::dynamic_code(v[i], inverse))) : 0;
    sum += code;
    packed |= (static_cast<uint32_t>(code) & 0xffu) << (8 * i);
  }
  for (int step = 1; step < lanes; step *= 2) sum += __shfl_xor_sync(qdq_rows::kAllLanes, sum, step);
  if (row < t.m) *reinterpret_cast<uint32_t*>(t.q.codes + row * padded(t.k) + k) = packed;
  const int64_t g = k / group;
  if (lane % lanes == 0 && g < groups) {
    const int64_t at = (row / kRows * groups + g) * kRows + row % kRows;
    t.q.scale[at] = row < t.m ? scale : 0.0f;
    t.q.sum[at] = sum;
  }
}

// The scales and zero points of this lane's four columns.
struct U4Scales {
  const uint8_t* scale;  // of its panel and quarter, group 0; null: no such columns
  const uint8_t* zero;   // or null: 8
  bool upper;            // nibbles

  __device__ __forceinline__ void load(int64_t g, float (&w)[4], int (&points)[4]) const {
    uint2 bits = make_uint2(0, 0);
    uint32_t nibbles = 0x08080808u;
    if (scale != nullptr) {
      bits = *reinterpret_cast<const uint2*>(scale + 32 * g);
      if (zero != nullptr) nibbles = *reinterpret_cast<const uint32_t*>(zero + 8 * g) >> (upper ? 4 : 0);
    }
    Four<__half> halves;
    memcpy(&halves, &bits, 8);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      w[j] = to_float(halves.at[j]);
      points[j] = static_cast<int>(nibbles >> (8 * j) & 15);
    }
  }
};
struct S8Scales {
  float scale[4];

  __device__ __forceinline__ void load(int64_t, float (&w)[4], int (&points)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      w[j] = scale[j];
      points[j] = 0;
    }
  }
};

// What a block works on, apart from the weights' kind.
template <int kTiles>
struct Rows {
  Codes<kTiles> codes;
  const float* scale;  // of this block of rows, group 0, row 2t
  const int32_t* sum;
  int64_t groups;
};

template <class Scales, int kTiles>
__device__ __forceinline__ void add_group(const FewSums<int32_t, kTiles>& sums, const Scales& scales,
                                          const Rows<kTiles>& rows, int64_t g, FewSums<float, kTiles>& total) {
  float w[4];
  int points[4];
  scales.load(g, w, points);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int64_t at = g * 8 * kTiles + 8 * tile;
    const float2 x_scale = *reinterpret_cast<const float2*>(rows.scale + at);
    const int2 x_sum = *reinterpret_cast<const int2*>(rows.sum + at);
#pragma unroll
    for (int set = 0; set < 2; ++set)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 2 * set + i / 2;
        const int sum = sums.at[tile][set][i] - points[j] * (i % 2 == 0 ? x_sum.x : x_sum.y);
        const float scale = __fmul_rn(i % 2 == 0 ? x_scale.x : x_scale.y, w[j]);
        total.at[tile][set][i] = __fmaf_rn(static_cast<float>(sum), scale, total.at[tile][set][i]);
      }
  }
}

// This warp's turns: groups of kSteps steps.
template <int kSteps, class Weights, class Scales, int kTiles>
__device__ __forceinline__ void add_turns(const Weights& weights, const Scales& scales, const Rows<kTiles>& rows,
                                          int64_t k, FewSums<float, kTiles>& total) {
  const int warp = static_cast<int>(threadIdx.x) / 32, turns = static_cast<int>(padded(k) / kTurnK);
  Turn<Weights> next;
  if (warp < turns) next.load(weights, warp);
  for (int turn = warp; turn < turns; turn += kWarps) {
    const Turn<Weights> now = next;
    TurnCodes<kTiles> x;
    x.load(rows.codes, turn);
    if (turn + kWarps < turns) next.load(weights, turn + kWarps);
#pragma unroll
    for (int i = 0; i < kTurnSteps; i += kSteps) {
      const int64_t g = (int64_t{turn} * kTurnSteps + i) / kSteps;
      if (g >= rows.groups) break;  // alike in all lanes
      FewSums<int32_t, kTiles> sums{};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) multiply_step(now, x, i + step, sums);
      add_group(sums, scales, rows, g, total);
    }
  }
}

template <int kTiles>
__device__ __forceinline__ void add_u4(const Task& t, int group, const Rows<kTiles>& rows,
                                       FewSums<float, kTiles>& total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, quarter = lane / 4 % 4;
  const int64_t panels = (t.n + 15) / 16, panel = int64_t{blockIdx.y} * (kFewColumns / 16) + lane / 16;
  const int64_t cells = rows.groups * group / 8;
  const bool there = panel < panels;
  const bool affine = reinterpret_cast<const PackHeader*>(t.pack)->dtype == u4::kDTypeAffine;
  const uint8_t* codes = t.pack + kPackHeaderBytes;
  const uint8_t* scale = codes + panels * cells * 64;
  const uint8_t* zero = scale + (panels * rows.groups * 32 + 63) / 64 * 64;
  const U4Weights weights{codes + (there ? panel * cells * 64 : 0) + 16 * quarter, there ? static_cast<int>(cells) : 0};
  const U4Scales scales{there ? scale + panel * rows.groups * 32 + 8 * quarter : nullptr,
                        affine ? zero + panel * rows.groups * 8 + quarter % 2 * 4 : nullptr, quarter >= 2};
  switch (group) {
    case 32: return add_turns<1>(weights, scales, rows, t.k, total);
    case 64: return add_turns<2>(weights, scales, rows, t.k, total);
    default: return add_turns<4>(weights, scales, rows, t.k, total);
  }
}

template <int kTiles>
__device__ __forceinline__ void add_s8(const Task& t, const Rows<kTiles>& rows, FewSums<float, kTiles>& total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, quarter = lane / 4 % 4;
  const int64_t panel = int64_t{blockIdx.y} * (kFewColumns / 16) + lane / 16;
  const int cells = static_cast<int>((t.k + 3) / 4);
  const bool there = 16 * panel < t.n;
  const S8Weights weights{t.pack + kPackHeaderBytes + (there ? panel * cells * 64 : 0) + 16 * quarter,
                          there ? cells : 0};
  S8Scales scales;
  const int64_t column = 16 * panel + 4 * quarter;
  const int count = column < t.n ? static_cast<int>(min(t.n - column, int64_t{4})) : 0;
  load_four(t.weight_scale + (count > 0 ? column : 0), count, scales.scale);
  add_turns<kTurnSteps>(weights, scales, rows, t.k, total);
}

// Two blocks an SM, but for 16 rows of s8: 9 registers would be spilled.
template <bool kU4, int kTiles>
__global__ void __launch_bounds__(kThreads, kU4 || kTiles == 1 ? 2 : 1) multiply_groups(Task t) {
  FS_SHARED(float, sums, [kWarps][8 * kTiles][kFewPitch]);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row0 = int64_t{blockIdx.x} * 8 * kTiles;
  const int group = group_of(t);
  const int64_t groups = (t.k + group - 1) / group, pair = blockIdx.x * groups * 8 * kTiles + thread % 4 * 2;
  const Rows<kTiles> rows{codes_of<kTiles>(t.q.codes + row0 * padded(t.k), t.m - row0, padded(t.k), padded(t.k)),
                          t.q.scale + pair, t.q.sum + pair, groups};
  FewSums<float, kTiles> total{};
  if constexpr (kU4)
    add_u4(t, group, rows, total);
  else
    add_s8(t, rows, total);
  store_sums(total, sums[thread / 32]);
  __syncthreads();
  const int row = thread / (kFewColumns / 4), first = thread % (kFewColumns / 4) * 4;
  const int64_t column = int64_t{blockIdx.y} * kFewColumns + first;
  if (row >= 8 * kTiles || row0 + row >= t.m || column >= t.n) return;
  const int count = static_cast<int>(min(t.n - column, int64_t{4}));
  float y[4], other[4];
  uint4 bits = ptx::load16(&sums[0][row][first]);
  memcpy(y, &bits, 16);
  for (int w = 1; w < kWarps; ++w) {
    bits = ptx::load16(&sums[w][row][first]);
    memcpy(other, &bits, 16);
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j] = __fadd_rn(y[j], other[j]);
  }
  if (t.bias != nullptr) {
    load_four(t.bias + column, count, other);
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j] = __fadd_rn(y[j], other[j]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) y[j] = activate(t.activation, y[j]);
  store_floats(t.y, t.dtype, (row0 + row) * t.n + column, count, y);
}

template <class T, int kTiles>
void launch_as(const Task& t, cudaStream_t stream) {
  constexpr int kRows = 8 * kTiles;
  const auto blocks = static_cast<unsigned>((t.m + kRows - 1) / kRows);
  if (t.k > 0)
    launch({dim3(blocks * kRows, static_cast<unsigned>((padded(t.k) / kTurnK + kWarps - 1) / kWarps)), dim3(kThreads),
            0, stream},
           quantize_groups<T, kRows>, t);
  const dim3 grid(blocks, static_cast<unsigned>((t.n + kFewColumns - 1) / kFewColumns));
  if (t.weight_scale == nullptr)
    launch({grid, dim3(kThreads), 0, stream}, multiply_groups<true, kTiles>, t);
  else
    launch({grid, dim3(kThreads), 0, stream}, multiply_groups<false, kTiles>, t);
}

template <int kTiles>
void launch_rows(const Task& t, cudaStream_t stream) {
  switch (t.dtype) {
    case DType::f32: return launch_as<float, kTiles>(t, stream);
    case DType::bf16: return launch_as<__nv_bfloat16, kTiles>(t, stream);
    case DType::f16: return launch_as<__half, kTiles>(t, stream);
  }
}

int64_t padded_rows(int64_t m) { return (m + 15) / 16 * 16; }

}  // namespace

int64_t weight_only_scratch_bytes(int64_t m, int64_t k) {
  return padded_rows(m) * (padded(k) + padded(k) / kSmallestGroup * int64_t{sizeof(float) + sizeof(int32_t)});
}

void weight_only_linear(const WeightOnlyArgs& a, uint8_t* scratch, void* stream) {
  if (a.m == 0 || a.n == 0) return;
  if (reinterpret_cast<uintptr_t>(a.weight) % 16 != 0)
    throw std::invalid_argument("weight_only_linear: weight must begin at a multiple of 16 bytes on CUDA; clone() it");
  const int64_t rows = padded_rows(a.m), groups = padded(a.k) / kSmallestGroup;
  auto* scale = reinterpret_cast<float*>(scratch + rows * padded(a.k));
  const Quantized q{reinterpret_cast<int8_t*>(scratch), scale, reinterpret_cast<int32_t*>(scale + rows * groups)};
  const Task t{a.x, a.x_stride, a.m, a.n, a.k, q, a.weight, a.weight_scale, a.bias, a.activation, a.y, a.dtype};
  if (a.m <= 8)
    launch_rows<1>(t, static_cast<cudaStream_t>(stream));
  else
    launch_rows<2>(t, static_cast<cudaStream_t>(stream));
}

}  // namespace fs::int8_gemm::sm80
