// sparse_linear from a bitmap32 of 16-bit values, CUDA sm_80: y[M,N] = act(x W^T + bias), M up to 16 at a time; all
// float16 or bfloat16, sums in float32.
// Idea     load sparse, compute dense, on tensor cores: a warp makes tiles of 16 k x 32 outputs from mask and values in
//          registers, as A of two mma.m16n8k16; B is x. So the work per weight hardly depends on the rows of x.
// Places   which output is which row of A and which k which column is free, as long as x agrees: lane (g, t) holds
//          outputs 4g .. 4g+3 at k t, t+4, t+8, t+12. The four outputs have their values beside each other, and one
//          popc finds the first; in one load the lanes of a warp touch four k beside each other, at 50% zeros 128
//          bytes.
// Work     a thread block of 16 warps takes 32 outputs; K is split over the warps. Where a warp's values begin only the
//          masks before tell, so the block counts them first: 1/8 byte a weight, read twice, the second time from L2.
// Reads    the values of a warp are one run of bytes, which goes through a ring of its own by cp.async, 512 bytes at a
//          time, up to 4 KB ahead whatever the masks are; masks and x a step of 32 k ahead in registers. x is permuted
//          to the places above on its way to shared memory.
// Ring     a tile takes at most 1 KB. The ring is filled at each tile until the next 512 bytes would reach what is not
//          used yet: that is more than 3.5 KB ahead, so the copies of the last two tiles may still be under way
//          (kLate).
// Sums     mma over ascending tiles in a warp; those of the warps are added in their order, then the bias. Bits depend
//          neither on M nor on the launch; inside mma the order is not specified.
// Tails    k: masks and x are zero there; n: bits beyond are zero, stores guarded; m: zero rows, stores guarded.
// Damage   positions are taken modulo the ring, and what lies outside of the values is not copied.
// Bound    DRAM: 2d + 1/8 bytes a weight, 1.78x dense at 50% zeros. By the machine code about 11 instructions of a warp
//          per 32 weights, in them one load of 2 bytes: 11.5 weights a clock of an SM where an H100's DRAM brings 13,
//          so these instructions are what to look at first.
// Tried    The bit as a number that moves the position: 6 instructions a weight; as a condition (below), with one R2P
//          for four of them: 4. A ring of 8 KB, filled every 32 k: a fifth fewer instructions, but its 152 KB of shared
//          memory are more than chips other than sm_80 and sm_90 have (99 KB).
// Open     the count costs a trip to DRAM before the first value comes; 32 outputs a block leave a GPU idle below N of
//          about 4000.
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

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kStep = 32;  // k that a warp takes at a time, one mask a lane
constexpr int kTile = 16;  // k of an mma
constexpr int kRing = 4096, kFill = 512;
constexpr int kLate = 2;
static_assert(kBitmapColumns == 32, "a lane has four of 32 outputs");
static_assert((kLate + 1) * kTile * 32 * 2 + kFill <= kRing, "what a tile may take has arrived");
static_assert(2 * kSlack >= kFill, "the last copy stays behind the values");

// Of each warp's shared memory: x, the spots of a step, the ring with room for its first bytes again. Sums take the
// place of all that.
template <int kRows>
constexpr int kXBytes = kStep / kTile * kRows * kTile * 2;
constexpr int kSpotBytes = 8 * kStep;
template <int kRows>
constexpr int kWarpBytes = kXBytes<kRows> + kSpotBytes + kRing + 16;

template <class T>
struct Task {
  bitmap16::Weight weight;
  int64_t warp_k;  // k of a warp, a multiple of kStep
  int warps;       // that have any
  int64_t row_groups;
  const uint16_t* x;
  int64_t x_stride, m;
  bool x_vectors;  // rows of x begin at multiples of 16 bytes
  const float* bias;
  Activation activation;
  T* y;
  HeaderIs header;
};

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>)
    ptx::mma_f16(d, a, b);
  else
    ptx::mma_bf16(d, a, b);
}

// The run of a warp's values on its way through the ring. Positions are bytes from the pack's first value, modulo 2^32.
struct Stream {
  const unsigned char* values;
  const unsigned char* source;  // what the lane copies next
  uint32_t filled;              // up to here copies were started; a multiple of kFill
  int copies, sound;            // to come; of them, how many lie within the pack: the others bring zeros
  unsigned char* ring;

  // Everything before `used` will not be read again, by any lane.
  __device__ __forceinline__ void fill(uint32_t used, int lane) {
    for (; copies > 0 && filled + kFill - used <= kRing; --copies, --sound, filled += kFill, source += kFill) {
      const int slot = static_cast<int>(filled % kRing), bytes = sound > 0 ? 16 : 0;
      const unsigned char* from = sound > 0 ? source : values;
#pragma unroll
      for (int i = 0; i < kFill; i += 512) ptx::cp_async<16>(ring + slot + 16 * lane + i, from + i, bytes);
      // A lane's four values may run beyond the ring: its first bytes are there, too.
      if (slot == 0 && lane == 0) ptx::cp_async<16>(ring + kRing, from, bytes);
    }
    ptx::cp_async_commit();
  }
};

// Of a k: its mask, and where its first value is.
struct Spot {
  uint32_t mask, first;
};

// Values of outputs 4g .. 4g+3 at a k; `below`: the bits below 4g.
__device__ __forceinline__ void decode(const unsigned char* ring, Spot spot, int g, uint32_t below, uint32_t (&w)[4]) {
  const unsigned char* at = ring + (spot.first + 2 * static_cast<uint32_t>(__popc(spot.mask & below))) % kRing;
  const uint32_t four = spot.mask >> 4 * g;
#pragma unroll
  for (int o = 0; o < 4; ++o) {
    w[o] = 0;
    if ((four & 1u << o) != 0) {
      w[o] = *reinterpret_cast<const uint16_t*>(at);  // conflicts as the masks are
      at += 2;
    }
  }
}

// 16 elements of x of a lane, from k on, as pairs.
template <class T>
__device__ __forceinline__ void load_x(const Task<T>& t, int64_t row, int64_t k, int64_t end, uint32_t (&x)[8]) {
#pragma unroll
  for (uint32_t& pair : x) pair = 0;
  if (row >= t.m || k >= end) return;
  const uint16_t* source = t.x + row * t.x_stride + k;
  if (t.x_vectors && k + kTile <= end) {
    const uint4 low = ptx::load16(source), high = ptx::load16(source + 8);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  } else {
#pragma unroll
    for (int i = 0; i < kTile; ++i)
      if (k + i < end) x[i / 2] |= static_cast<uint32_t>(source[i]) << 16 * (i % 2);
  }
}

// Byte of the 16 for t / 2 of a row's 32 in a tile of x.
__device__ __forceinline__ int x_offset(int row, int half) { return 32 * row + 16 * (half ^ (row / 4 % 2)); }

// The same to shared memory as the places want them: k t, t+4, t+8, t+12 beside each other.
__device__ __forceinline__ void store_x(unsigned char* tile, int row, const uint32_t (&x)[8]) {
  uint32_t y[8];
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int pair = 0; pair < 2; ++pair)
      y[2 * t + pair] = __byte_perm(x[4 * pair + t / 2], x[4 * pair + 2 + t / 2], t % 2 == 0 ? 0x5410 : 0x7632);
  ptx::store16(tile + x_offset(row, 0), make_uint4(y[0], y[1], y[2], y[3]));
  ptx::store16(tile + x_offset(row, 1), make_uint4(y[4], y[5], y[6], y[7]));
}

// How many of the lanes' counts stand below.
__device__ __forceinline__ uint32_t sum_below(uint32_t count, int lane) {
  uint32_t sum = count;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAll, sum, step);
    if (lane >= step) sum += other;
  }
  return sum - count;
}

// Sums of two halves of the outputs (4g + 2 * half + i / 2) and kRows rows of x (8j + 2t + i % 2).
template <int kRows>
struct Sums {
  float at[2][kRows / 8][4];
};

// Adds the products of 16 k.
template <class T, int kRows>
__device__ __forceinline__ void multiply_tile(const unsigned char* ring, const unsigned char* x, const Spot* spots,
                                              int lane, Sums<kRows>& sums) {
  const int g = lane / 4, t = lane % 4;
  const uint32_t below = (1u << 4 * g) - 1;
  uint32_t w[4][4];  // [k t + 4i][output]
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint2 spot = ptx::load8(spots + 4 * i + t);
    decode(ring, {spot.x, spot.y}, g, below, w[i]);
  }
  uint32_t b[kRows / 8][2];
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j) {
    const uint2 two = ptx::load8(x + x_offset(8 * j + g, t / 2) + 8 * (t % 2));
    b[j][0] = two.x, b[j][1] = two.y;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int o = 2 * half + i % 2, k = i / 2 * 2;
      a[i] = __byte_perm(w[k][o], w[k + 1][o], 0x5410);
    }
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) mma<T>(sums.at[half][j], a, b[j]);
  }
}

// Where the sums of 4 outputs of a row lie among a warp's: chunks of 16 bytes, swizzled.
__device__ __forceinline__ int sum_offset(int row, int chunk) { return 32 * row + 4 * (chunk ^ (row / 2 % 4 * 2)); }

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, 1) few_rows16(Task<T> t) {
  FS_SHARED(unsigned, counts, [kWarps]);
  FS_DYNAMIC_SHARED(memory);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t block = blockIdx.x / t.row_groups, row0 = blockIdx.x % t.row_groups * kRows;
  const int64_t begin = min(warp * t.warp_k, t.weight.k), end = min(begin + t.warp_k, t.weight.k);
  const uint32_t* mask = t.weight.mask + block * t.weight.k;

  unsigned count = 0;
  for (int64_t k = begin + lane; k < end; k += kStep) count += static_cast<unsigned>(__popc(mask[k]));
  count = __reduce_add_sync(kAll, count);
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  uint64_t before = t.weight.offset[block];
  for (int w = 0; w < warp; ++w) before += counts[w];
  // The offsets are the pack's, and may be anything.
  const uint64_t total = static_cast<uint64_t>(t.weight.total);
  const int64_t run = 2 * static_cast<int64_t>(before < total ? before : total), run0 = run / kFill * kFill;
  const int64_t run_bytes = 2 * static_cast<int64_t>(count) + run - run0, there = 2 * (t.weight.total + kSlack) - run0;
  unsigned char* own = memory + warp * kWarpBytes<kRows>;
  auto* spots = reinterpret_cast<Spot*>(own + kXBytes<kRows>);
  uint32_t used = static_cast<uint32_t>(run);
  const auto* values = reinterpret_cast<const unsigned char*>(t.weight.value);
  Stream stream{values,
                values + run0 + 16 * lane,
                static_cast<uint32_t>(run0),
                static_cast<int>((run_bytes + kFill - 1) / kFill),
                static_cast<int>(min(there / kFill, int64_t{1} << 30)),
                own + kXBytes<kRows> + kSpotBytes};
  stream.fill(used, lane);
  for (int i = 1; i < kLate; ++i) ptx::cp_async_commit();

  // A lane brings 16 k of a row of x.
  const int x_row = lane % kRows, x_tile = lane / kRows;
  const bool brings_x = x_tile < kStep / kTile;
  const auto mask_at = [&](int64_t k) { return k + lane < end ? mask[k + lane] : 0u; };
  uint32_t bits = mask_at(begin), x[8];
  if (brings_x) load_x(t, row0 + x_row, begin + kTile * x_tile, end, x);
  Sums<kRows> sums{};
  for (int64_t k = begin; k < end; k += kStep) {
    if (brings_x) store_x(own + x_tile * (kXBytes<kRows> / 2), x_row, x);
    const uint32_t bytes = 2 * static_cast<uint32_t>(__popc(bits)), first = used + sum_below(bytes, lane);
    ptx::store8(spots + lane, make_uint2(bits, first));
    bits = mask_at(k + kStep);
    if (brings_x) load_x(t, row0 + x_row, k + kStep + kTile * x_tile, end, x);
#pragma unroll
    for (int tile = 0; tile < kStep / kTile; ++tile) {
      stream.fill(__shfl_sync(kAll, first, kTile * tile), lane);
      ptx::cp_async_wait<kLate>();
      __syncwarp();  // values, x and spots are there for all lanes
      multiply_tile<T, kRows>(stream.ring, own + tile * (kXBytes<kRows> / 2), spots + kTile * tile, lane, sums);
      __syncwarp();  // nobody reads what comes in their place
    }
    used = __shfl_sync(kAll, first + bytes, 31);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // nobody reads any of that any more

  float* results = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float four[4] = {sums.at[0][j][i], sums.at[0][j][2 + i], sums.at[1][j][i], sums.at[1][j][2 + i]};
      uint4 chunk;
      memcpy(&chunk, four, 16);
      ptx::store16(results + warp * kRows * 32 + sum_offset(8 * j + lane % 4 * 2 + i, lane / 4), chunk);
    }
  __syncthreads();

  // A thread a result: 32 outputs of a row beside each other.
  const int64_t output = block * kBitmapColumns + lane;
  if (warp >= kRows || row0 + warp >= t.m || output >= t.weight.n) return;
  const float* sum = results + sum_offset(warp, lane / 4) + lane % 4;
  float y = sum[0];
  for (int w = 1; w < t.warps; ++w) y = __fadd_rn(y, sum[w * kRows * 32]);
  if (t.bias != nullptr) y = __fadd_rn(y, t.bias[output]);
  if (!holds(t.header)) y = not_a_number();
  t.y[(row0 + warp) * t.weight.n + output] = from_float<T>(activate(t.activation, y));
}

template <class T, int kRows>
void launch_rows(Task<T> t, cudaStream_t stream) {
  static_assert(kRows <= kWarps && kRows * 32 * 4 <= kWarpBytes<kRows>, "a warp stores a row, and its sums fit");
  t.row_groups = (t.m + kRows - 1) / kRows;
  const int64_t blocks = (t.weight.n + kBitmapColumns - 1) / kBitmapColumns;
  launch({dim3(static_cast<unsigned>(blocks * t.row_groups)), dim3(kThreads), kWarps * kWarpBytes<kRows>, stream},
         few_rows16<T, kRows>, t);
}

template <class T>
void linear_as(const bitmap16::Weight& weight, const Rows& rows, cudaStream_t stream) {
  const int64_t steps = (weight.k + kStep - 1) / kStep, warp_steps = (steps + kWarps - 1) / kWarps;
  const int warps = warp_steps == 0 ? 0 : static_cast<int>((steps + warp_steps - 1) / warp_steps);
  const auto* x = static_cast<const uint16_t*>(rows.x);
  const bool x_vectors = reinterpret_cast<uintptr_t>(x) % 16 == 0 && rows.x_stride % kChunk == 0;
  const Task<T> t{
      weight,          warp_steps * kStep,      warps,      0, x, rows.x_stride, rows.m, x_vectors, rows.bias,
      rows.activation, static_cast<T*>(rows.y), rows.header};
  if (rows.m <= 8) return launch_rows<T, 8>(t, stream);
  launch_rows<T, 16>(t, stream);
}

}  // namespace

void linear_bitmap16(const bitmap16::Weight& weight, const Rows& rows, void* stream) {
  if (rows.m == 0 || weight.n == 0) return;
  if (rows.dtype != weight.dtype)
    throw std::invalid_argument("sparse_linear: x must have the dtype of a bitmap32 of 16-bit values");
  if (reinterpret_cast<uintptr_t>(weight.offset) % 16 != 0)
    throw std::invalid_argument("sparse_linear: weight must begin at a multiple of 16 bytes on CUDA; clone() it");
  auto* s = static_cast<cudaStream_t>(stream);
  if (weight.dtype == DType::f16) return linear_as<__half>(weight, rows, s);
  linear_as<__nv_bfloat16>(weight, rows, s);
}

}  // namespace fs::sparse_matmul::sm80
