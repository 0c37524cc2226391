// sparse_linear from bitmap32, CUDA sm_80: y[M,N] = act(x W^T + bias), M up to 16 at a time; sums in float32.
// Idea     load sparse, compute dense: a lane is an output, a warp is a block of 32 outputs. Per k the lane's bit of
//          the mask says whether its weight is stored, and the bits below say where; a weight that is not is a zero
//          in a register.
// Work     a block of 16 warps takes 32 outputs; K is split over the warps, in steps of 32. Where a warp's values begin
//          only the masks before tell, so the block counts them first: 1/8 byte a weight, read twice, the second time
//          from L2 or L1.
// Reads    32 masks by one coalesced load, handed round by shuffles; values in runs, each byte once from DRAM; x by
//          lanes side by side, through a tile of shared memory that is read as broadcasts of 16 bytes (4 k).
// Sums     a warp's are one chain of fmaf over ascending k from +0; those of the warps are added in their order, then
//          the bias. So with K <= 32 the bits are those of the CPU's kernels; beyond, within the same bound of error.
//          Bits depend neither on M nor on the launch.
// Tails    k: masks and x are zero there; n: bits beyond are zero, stores guarded; m: zero rows, stores guarded.
//          The position of a value is held at the number of values, behind which the pack has room.
// Bound    DRAM at 50% zeros: 4d + 1/8 bytes a weight. Per k and warp (32 weights) about 2 shuffles, a popc, a load,
//          M/4 loads of x and M fmaf: at 80% zeros the load/store pipe is as long as DRAM, at M = 16 the fmaf are.
// Compiled nvcc 13.0, sm_80: 40 / 42 / 52 / 56 / 86 registers for 1 / 2 / 4 / 8 / 16 rows, no spills.
// Open     N = 768 is 24 blocks: K split over blocks, too, would fill a whole GPU.
// Measured never run on hardware.
#include <stdexcept>

#include "../../runtime/cuda/activate.h"
#include "../../runtime/cuda/device.h"
#include "holds.h"
#include "sm80.h"

namespace fs::sparse_matmul::sm80 {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kStep = 32;  // k that a warp takes at a time, one mask a lane
constexpr int kAhead = 8;  // of them, values that are loaded before the first is used
constexpr int kMaxRows = 16;
static_assert(kBitmapColumns == 32, "a lane is an output");
static_assert(kSlack >= 32, "the lanes read at most so far behind the last value");

template <class T>
struct Task {
  const uint64_t* offset;
  const uint32_t* mask;
  const float* value;
  int64_t total, n, k;
  int64_t warp_k;  // k of a warp, a multiple of kStep
  int warps;       // that have any
  int64_t row_groups;
  const T* x;
  int64_t x_stride, m;
  const float* bias;
  Activation activation;
  T* y;
  HeaderIs header;
};

// How many values the masks [begin, end) of this block of outputs have; the same in all lanes.
__device__ __forceinline__ unsigned count_values(const uint32_t* mask, int64_t begin, int64_t end, int lane) {
  unsigned count = 0;
  for (int64_t k = begin + lane; k < end; k += kStep) count += static_cast<unsigned>(__popc(mask[k]));
  return __reduce_add_sync(kAll, count);
}

// The sum of the lanes below.
__device__ __forceinline__ int sum_below(int value, int lane) {
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAll, sum, step);
    if (lane >= step) sum += other;
  }
  return sum - value;
}

// Adds the products of the 32 k that `mask` (one a lane) and x_tile hold; value[0] belongs to the first bit.
// `room`: positions are held at it.
template <int kRows>
__device__ __forceinline__ void multiply_step(uint32_t mask, const float* value, int room,
                                              const float (&x_tile)[kRows][kStep], int lane, float (&sum)[kRows]) {
  const int position = min(sum_below(__popc(mask), lane), room);
  const uint32_t below = (1u << lane) - 1;
#pragma unroll
  for (int k = 0; k < kStep; k += kAhead) {
    float w[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const uint32_t bits = __shfl_sync(kAll, mask, k + i);
      const int first = __shfl_sync(kAll, position, k + i);
      w[i] = (bits >> lane & 1) != 0 ? __ldg(value + first + __popc(bits & below)) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kAhead; i += 4)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 x = *reinterpret_cast<const float4*>(&x_tile[r][k + i]);
        sum[r] = __fmaf_rn(w[i], x.x, sum[r]);
        sum[r] = __fmaf_rn(w[i + 1], x.y, sum[r]);
        sum[r] = __fmaf_rn(w[i + 2], x.z, sum[r]);
        sum[r] = __fmaf_rn(w[i + 3], x.w, sum[r]);
      }
  }
}

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads) few_rows(Task<T> t) {
  FS_SHARED(unsigned, counts, [kWarps]);
  FS_SHARED(float, tiles, [kWarps][kRows][kStep]);  // x, then sums
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t block = blockIdx.x / t.row_groups, row0 = blockIdx.x % t.row_groups * kRows;
  const int64_t begin = min(warp * t.warp_k, t.k), end = min(begin + t.warp_k, t.k);
  const uint32_t* mask = t.mask + block * t.k;
  const T* x = t.x + row0 * t.x_stride;
  const int rows = static_cast<int>(min(t.m - row0, static_cast<int64_t>(kRows)));

  const unsigned count = count_values(mask, begin, end, lane);
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  uint64_t first = t.offset[block];
  for (int w = 0; w < warp; ++w) first += counts[w];

  float (&tile)[kRows][kStep] = tiles[warp];
  float sum[kRows] = {};
  for (int64_t k = begin; k < end; k += kStep) {
    const bool inside = k + lane < end;
    const uint32_t bits = inside ? mask[k + lane] : 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) tile[r][lane] = inside && r < rows ? to_float(x[r * t.x_stride + k + lane]) : 0.0f;
    __syncwarp();
    // The offsets are the pack's, and may be anything.
    const uint64_t total = static_cast<uint64_t>(t.total), held = first < total ? first : total;
    const uint64_t room = total - held;
    multiply_step<kRows>(bits, t.value + held, static_cast<int>(room < 1024 ? room : 1024), tile, lane, sum);
    first += __reduce_add_sync(kAll, static_cast<unsigned>(__popc(bits)));
    __syncwarp();
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) tile[r][lane] = sum[r];
  __syncthreads();

  // A thread a result: 32 outputs of a row beside each other.
  const int64_t output = block * kBitmapColumns + lane;
  if (warp >= rows || output >= t.n) return;
  float y = tiles[0][warp][lane];
  for (int w = 1; w < t.warps; ++w) y = __fadd_rn(y, tiles[w][warp][lane]);
  if (t.bias != nullptr) y = __fadd_rn(y, t.bias[output]);
  if (!holds(t.header)) y = not_a_number();
  t.y[(row0 + warp) * t.n + output] = from_float<T>(activate(t.activation, y));
}

template <class T, int kRows>
void launch_rows(Task<T> t, int64_t blocks, cudaStream_t stream) {
  static_assert(kRows <= kMaxRows && kRows <= kWarps, "a warp stores a row");
  t.row_groups = (t.m + kRows - 1) / kRows;
  launch({dim3(static_cast<unsigned>(blocks * t.row_groups)), dim3(kThreads), 0, stream}, few_rows<T, kRows>, t);
}

template <class T>
void linear_as(const Pack& p, const Rows& rows, cudaStream_t stream) {
  const int64_t steps = (p.k + kStep - 1) / kStep, warp_steps = (steps + kWarps - 1) / kWarps;
  const int warps = warp_steps == 0 ? 0 : static_cast<int>((steps + warp_steps - 1) / warp_steps);
  const Task<T> t{p.offset,
                  p.mask,
                  p.value,
                  p.total,
                  p.n,
                  p.k,
                  warp_steps * kStep,
                  warps,
                  0,
                  static_cast<const T*>(rows.x),
                  rows.x_stride,
                  rows.m,
                  rows.bias,
                  rows.activation,
                  static_cast<T*>(rows.y),
                  rows.header};
  const int64_t blocks = (p.n + kBitmapColumns - 1) / kBitmapColumns;
  if (rows.m <= 1) return launch_rows<T, 1>(t, blocks, stream);
  if (rows.m <= 2) return launch_rows<T, 2>(t, blocks, stream);
  if (rows.m <= 4) return launch_rows<T, 4>(t, blocks, stream);
  if (rows.m <= 8) return launch_rows<T, 8>(t, blocks, stream);
  launch_rows<T, kMaxRows>(t, blocks, stream);
}

}  // namespace

void linear_bitmap32(const Pack& weight, const Rows& rows, void* stream) {
  if (rows.m == 0 || weight.n == 0) return;
  if (reinterpret_cast<uintptr_t>(weight.offset) % 16 != 0)
    throw std::invalid_argument("sparse_linear: weight must begin at a multiple of 16 bytes on CUDA; clone() it");
  auto* s = static_cast<cudaStream_t>(stream);
  switch (rows.dtype) {
    case DType::f32: return linear_as<float>(weight, rows, s);
    case DType::bf16: return linear_as<__nv_bfloat16>(weight, rows, s);
    case DType::f16: return linear_as<__half>(weight, rows, s);
  }
}

}  // namespace fs::sparse_matmul::sm80
