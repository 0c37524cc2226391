// int8_linear, CUDA sm_80, the plain kernel: y[M,N] = act(x_q W^T * x_scale * weight_scale + bias), exact integers.
// Idea     two kernels: rows of x to s8 and a scale each, then a tile of C by dp4a (4 products an instruction).
// Tile     64 x 64 of C a block of 256 threads, 4 x 4 a thread; 32 k a stage through shared memory.
// Reads    W in vnni16: the 4 k of one column are one word, which is what dp4a wants; 64-byte runs per 16 columns.
// Tails    m, n: zero words in shared memory, guarded stores; k: the codes are zero-padded to 32, weights read as zero.
// Bound    dp4a: a quarter of the tensor cores' rate or less. The mma kernel that replaces it needs the CPU stand-in
// first. Measured never run on hardware.
#include "sm80.h"

#include <cfloat>

#include "../../runtime/cuda/device.h"
#include "../formats/vnni16.h"

namespace fs::int8_gemm::sm80 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 64;       // rows and columns of C a block
constexpr int kStageWords = 8;  // words of 4 k in a stage
constexpr int kPadK = 4 * kStageWords;
constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ inline int64_t padded(int64_t k) { return (k + kPadK - 1) / kPadK * kPadK; }

// One block a row: the codes of x, zero-padded to padded(k), and the row's scale. int8_gemm.h gives the formulas.
template <class T>
__global__ void quantize_rows(const T* x, int64_t x_stride, int64_t k, bool dynamic, float static_scale,
                              int32_t zero_point, int8_t* codes, float* scales) {
  FS_SHARED(unsigned, warp_max, [kWarps]);
  const int64_t row = blockIdx.x;
  x += row * x_stride;
  codes += row * padded(k);
  float scale = static_scale;
  bool finite = true;
  if (dynamic) {
    unsigned absmax = 0;  // of |x| as integers: NaN > inf > every finite value
    for (int64_t i = threadIdx.x; i < k; i += kThreads)
      absmax = max(absmax, __float_as_uint(to_float(x[i])) & 0x7fffffffu);
    for (int step = 16; step > 0; step /= 2) absmax = max(absmax, __shfl_xor_sync(kAllLanes, absmax, step));
    if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = absmax;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) absmax = max(absmax, warp_max[w]);
    finite = absmax < 0x7f800000u;
    scale = absmax == 0 ? 1.0f : fmaxf(__fdiv_rn(__uint_as_float(absmax), 127.0f), FLT_MIN);
  }
  const float inverse = __fdiv_rn(1.0f, scale);
  for (int64_t i = threadIdx.x; i < padded(k); i += kThreads) {
    int code = 0;
    if (i < k && finite) {
      const float t = __fmul_rn(to_float(x[i]), inverse);
      // fminf and fmaxf drop a NaN: a static NaN becomes the zero point
      code =
          dynamic ? __float2int_rn(t) : __float2int_rn(t == t ? fmaxf(fminf(t, 256.0f), -256.0f) : 0.0f) + zero_point;
      code = max(-128, min(127, code));
    }
    codes[i] = static_cast<int8_t>(code);
  }
  if (threadIdx.x == 0) scales[row] = finite ? scale : __int_as_float(0x7fc00000);
}

__device__ inline float activate(Activation activation, float y) {
  switch (activation) {
    case Activation::relu: return y < 0.0f ? 0.0f : y;
    case Activation::gelu: return y * 0.5f * erfcf(-0.707106781f * y);
    case Activation::silu: return y / (1.0f + expf(-y));
    default: return y;
  }
}

struct Epilogue {
  const float* x_scale;
  const float* weight_scale;
  const float* bias;
  const int32_t* column_sum;
  int32_t zero_point;
  Activation activation;
};

template <class T>
__global__ void multiply(const int8_t* codes, const int8_t* weight, int64_t m, int64_t n, int64_t row_words,
                         int64_t weight_words, Epilogue e, T* y) {
  FS_SHARED(int, a_tile, [kStageWords][kTile]);  // [word of 4 k][row]
  FS_SHARED(int, b_tile, [kStageWords][kTile]);  // [word of 4 k][column]
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kTile, column0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const int* weights = reinterpret_cast<const int*>(weight);
  const int* words = reinterpret_cast<const int*>(codes);
  const int ty = static_cast<int>(threadIdx.x) / 16, tx = static_cast<int>(threadIdx.x) % 16;
  int sums[4][4] = {};
  for (int64_t word0 = 0; word0 < row_words; word0 += kStageWords) {
    for (int i = static_cast<int>(threadIdx.x); i < kStageWords * kTile; i += kThreads) {
      const int word = i / kTile, j = i % kTile;
      const int64_t row = row0 + j, column = column0 + j, w = word0 + word;
      a_tile[word][j] = row < m ? words[row * row_words + w] : 0;
      b_tile[word][j] =
          column < n && w < weight_words ? weights[((column / 16) * weight_words + w) * 16 + column % 16] : 0;
    }
    __syncthreads();
    for (int word = 0; word < kStageWords; ++word) {
      int a[4], b[4];
      for (int i = 0; i < 4; ++i) a[i] = a_tile[word][ty + 16 * i];
      for (int j = 0; j < 4; ++j) b[j] = b_tile[word][tx + 16 * j];
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) sums[i][j] = __dp4a(a[i], b[j], sums[i][j]);
    }
    __syncthreads();  // the next stage overwrites both tiles
  }
  for (int i = 0; i < 4; ++i) {
    const int64_t row = row0 + ty + 16 * i;
    if (row >= m) continue;
    for (int j = 0; j < 4; ++j) {
      const int64_t column = column0 + tx + 16 * j;
      if (column >= n) continue;
      const int sum = sums[i][j] - e.zero_point * e.column_sum[column];
      const float scale = __fmul_rn(e.x_scale[row], e.weight_scale[column]);
      const float result = __fmaf_rn(static_cast<float>(sum), scale, e.bias == nullptr ? -0.0f : e.bias[column]);
      y[row * n + column] = from_float<T>(activate(e.activation, result));
    }
  }
}

template <class T>
void linear_as(const LinearArgs& a, uint8_t* scratch, cudaStream_t stream) {
  auto* codes = reinterpret_cast<int8_t*>(scratch);
  auto* scales = reinterpret_cast<float*>(scratch + a.m * padded(a.k));  // padded(k) is a multiple of 32
  const dim3 block(kThreads);
  launch({dim3(static_cast<unsigned>(a.m)), block, 0, stream}, quantize_rows<T>, static_cast<const T*>(a.x), a.x_stride,
         a.k, a.dynamic, a.x_scale, a.x_zero_point, codes, scales);
  const Epilogue e{
      scales,      a.weight_scale, a.bias, vnni16::column_sums(a.weight, a.n, a.k), a.dynamic ? 0 : a.x_zero_point,
      a.activation};
  const dim3 grid(static_cast<unsigned>((a.m + kTile - 1) / kTile), static_cast<unsigned>((a.n + kTile - 1) / kTile));
  launch({grid, block, 0, stream}, multiply<T>, codes, vnni16::weights(a.weight), a.m, a.n, padded(a.k) / 4,
         vnni16::padded_k(a.k) / 4, e, static_cast<T*>(a.y));
}

}  // namespace

int64_t scratch_bytes(int64_t m, int64_t k) { return m * (padded(k) + static_cast<int64_t>(sizeof(float))); }

void linear(const LinearArgs& args, uint8_t* scratch, void* stream) {
  if (args.m == 0 || args.n == 0) return;
  auto* s = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::f32: return linear_as<float>(args, scratch, s);
    case DType::bf16: return linear_as<__nv_bfloat16>(args, scratch, s);
    case DType::f16: return linear_as<__half>(args, scratch, s);
  }
}

}  // namespace fs::int8_gemm::sm80
