// Defects planted on purpose: what the stand-in must catch. Three right kernels and one of assorted calls, each with
// `if constexpr (kDefect == ...)` where it goes wrong; defect 0 is none. test_cuda_defects.py has the table: what each
// is, which builds catch it, and how. The lines to be named carry the comment `<number>` in angle brackets.
#include "../../csrc/runtime/cuda/device.h"
#include "runtime/entry.h"

namespace {

using fs::launch;

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

// --- 1. sums[b] = the sum of block b's 512 values, twice over (so that shared memory is used again)
// -------------------

template <int kDefect>
__device__ __forceinline__ int sum_of_warp(int value) {
  if constexpr (kDefect == 1) {  // too few steps: the upper lanes are lost
    for (int step = 8; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  } else if constexpr (kDefect == 2) {
    for (int step = 16; step > 0; step /= 2)
      if (threadIdx.x % 32 < 16) value += __shfl_down_sync(0x0000ffffu, value, 16);  // <2>
  } else if constexpr (kDefect == 3) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0x7fffffffu, value, step);  // <3>
  } else if constexpr (kDefect == 4) {
    if (threadIdx.x % 32 < 16)
      value += __shfl_xor_sync(kAll, value, 1);  // <4>
    else
      value += __shfl_xor_sync(kAll, value, 2);  // <4>
  } else if constexpr (kDefect == 5) {
    value += __shfl_xor_sync(kAll, value, 1, 24);  // <5>
  } else {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);  // <6>
  }
  return value;
}

template <int kDefect>
__global__ void sums(const int* in, int* out, int n, const int* host) {
  FS_SHARED(int, of_warp, [kWarps]);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int per_block = n / static_cast<int>(gridDim.x);
  const int* mine = in + static_cast<int>(blockIdx.x) * per_block;
  if constexpr (kDefect == 6)
    if (thread == 5) return;
  int total = 0;
  for (int pass = 0; pass < 2; ++pass) {
    int value = 0;
    for (int i = thread; i < per_block; i += kThreads) value += mine[i];
    if constexpr (kDefect == 7) value += in[n + thread % 4];                              // <7>
    if constexpr (kDefect == 8) value += *(host + thread);                                // <8>
    if constexpr (kDefect == 9) value += *reinterpret_cast<const int*>(16 + 4 * thread);  // <9>
    value = sum_of_warp<kDefect>(value);                                                  // <6>
    if constexpr (kDefect == 10) {
      if (lane == 0) of_warp[warp + 1] = value;  // <10>
    } else if constexpr (kDefect == 11) {
      if (lane == 0 && warp > 0) of_warp[warp] = value;
    } else {
      if (lane == 0) of_warp[warp] = value;  // <12> <13>
    }
    if constexpr (kDefect == 14) {
      if (warp < 2)
        __syncthreads();  // <14>
      else
        __syncthreads();  // <14>
    } else if constexpr (kDefect == 15) {
      if (warp != 2) __syncthreads();  // <15>
      __ballot_sync(kAll, warp == 2);
    } else if constexpr (kDefect == 16) {
      if (lane < 16)
        __syncthreads();  // <16>
      else
        __syncwarp();  // <16>
    } else if constexpr (kDefect != 12) {
      __syncthreads();
    }
    total = 0;
    for (int w = 0; w < kWarps; ++w) total += of_warp[w];  // <11> <12> <13>
    if constexpr (kDefect != 13) __syncthreads();
  }
  if constexpr (kDefect == 17) {
    out[0] = total + thread / 32;  // <17>
  } else if constexpr (kDefect == 18) {
    if (thread == 0) out[0] = total;  // <18>
  } else if constexpr (kDefect == 19) {
    if (thread == 0) out[blockIdx.x] += total;  // <19>
  } else if constexpr (kDefect == 20) {
    if (thread == 0) out[blockIdx.x] = 0;  // <20>
    atomicAdd(&out[blockIdx.x], 1);        // <20>
  } else {
    if (thread == 0) out[blockIdx.x] = total;
  }
}

// Within a warp: what one lane writes another reads.
template <int kDefect>
__global__ void reversed(const int* in, int* out) {
  FS_SHARED(int, words, [32 * 32]);
  const int lane = static_cast<int>(threadIdx.x);
  if constexpr (kDefect == 24) {  // 16 bytes of every 32: a quarter of the warp meets in half of the banks
    FS_SHARED(uint4, wide, [64]);
    fs::ptx::store16(&wide[2 * lane], make_uint4(static_cast<unsigned>(in[lane]), 0, 0, 0));
    __syncwarp();
    out[lane] = static_cast<int>(fs::ptx::load16(&wide[2 * (31 - lane)]).x);
    return;
  }
  constexpr int kStride = kDefect == 23 ? 32 : 1;  // 23: a column of a tile that is not padded
  words[kStride * lane] = in[lane];                // <21>
  if constexpr (kDefect == 21)
    __ballot_sync(kAll, 1);  // orders no memory
  else
    __syncwarp();
  out[lane] = words[kStride * (31 - lane)];  // <21>
}

// --- 2. out = in, through a ring of stages filled by cp.async
// ----------------------------------------------------------

constexpr int kStages = 3;
constexpr int kStageBytes = 16 * kThreads;

template <int kDefect>
__global__ void ring_copy(const int* in, int* out, int n) {
  FS_DYNAMIC_SHARED(memory);
  const int thread = static_cast<int>(threadIdx.x);
  const auto* source = reinterpret_cast<const unsigned char*>(in);
  const int bytes = 4 * n, steps = (bytes + kStageBytes - 1) / kStageBytes;
  const auto fetch = [&](int step) {
    if (step < steps) {
      const int at = step * kStageBytes + 16 * thread;
      const int left = bytes - at < 0 ? 0 : bytes - at < 16 ? bytes - at : 16;
      unsigned char* target = memory + step % kStages * kStageBytes + 16 * thread;
      if constexpr (kDefect == 31)
        fs::ptx::cp_async<16>(target, source + at);  // <31>
      else if constexpr (kDefect == 32)
        fs::ptx::cp_async<16>(target, source + at + 4, left);  // <32>
      else if constexpr (kDefect == 33)
        fs::ptx::cp_async<16>(target + (step == 2 ? 16 : 0), left > 0 ? source + at : source, left);  // <33>
      else if constexpr (kDefect == 34)
        fs::ptx::cp_async<16>(out, source, left);  // <34>
      else
        fs::ptx::cp_async<16>(target, left > 0 ? source + at : source, left);  // <35> <36> <38> <40>
    }
    if constexpr (kDefect != 37) fs::ptx::cp_async_commit();
  };
  constexpr int kAhead = kDefect == 40 ? kStages : kStages - 1;
  for (int step = 0; step < kAhead; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    if constexpr (kDefect == 35)
      fs::ptx::cp_async_wait<kStages - 1>();
    else if constexpr (kDefect == 38)
      __syncthreads();  // before the wait: the others' copies are not covered
    if constexpr (kDefect != 35 && kDefect != 39) fs::ptx::cp_async_wait<kAhead - 1>();
    if constexpr (kDefect != 36 && kDefect != 38) __syncthreads();
    // Read what another thread fetched, so that the barrier matters.
    const int other = (thread + 32) % kThreads;
    const unsigned char* stage = memory + step % kStages * kStageBytes;
    const uint4 v = fs::ptx::load16(stage + 16 * other);  // <35> <36> <37> <38> <39> <40>
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
    const int at = step * kStageBytes / 4 + 4 * other;
    for (int i = 0; i < 4; ++i)
      if (at + i < n) out[at + i] = static_cast<int>(words[i]);
    fetch(step + kAhead);  // 40: into the stage that others still read
  }
}

// --- 3. C[16,8] = A[16,64] s8 * B[8,64]^T s8, swizzled shared memory, ldmatrix, mma
// --------------------------------------

// Row r of 64 bytes is cut into chunks of 16; two rows share 128 bytes, and the chunks change places from pair to pair.
template <int kDefect>
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  if constexpr (kDefect == 51) return 64 * row + 16 * chunk;
  return 64 * row + 16 * (chunk ^ (row / 2 % 4));
}

template <int kDefect>
__global__ void small_product(const int* in, int* out) {
  FS_SHARED(unsigned char, a, [16 * 64]);
  FS_SHARED(unsigned char, b, [8 * 64]);
  const int lane = static_cast<int>(threadIdx.x);
  const auto* source = reinterpret_cast<const unsigned char*>(in);
  for (int i = lane; i < 24 * 4; i += 32) {
    const int row = i / 4, chunk = i % 4;
    unsigned char* target = row < 16 ? a + chunk_at<kDefect>(row, chunk) : b + chunk_at<kDefect>(row - 16, chunk);
    fs::ptx::store16(target, fs::ptx::load16(source + 16 * i));
  }
  __syncwarp();
  int32_t sums[4] = {};
  if constexpr (kDefect == 52)
    if (lane >= 16) return;
  for (int k = 0; k < 2; ++k) {  // 32 of K each
    uint32_t fa[4], fb[2];
    const int row = lane % 16, chunk = 2 * k + lane / 16;
    if constexpr (kDefect == 53)
      fs::ptx::ldmatrix_x4(fa, a + chunk_at<kDefect>(row, chunk) + 4);  // <53>
    else if constexpr (kDefect == 54)
      fs::ptx::ldmatrix_x4(fa, a + chunk_at<kDefect>(row + 16, chunk));  // <54>
    else if constexpr (kDefect == 55)
      fs::ptx::ldmatrix_x4_trans(fa, a + chunk_at<kDefect>(row, chunk));
    else if constexpr (kDefect == 56)
      fs::ptx::ldmatrix_x4(fa, a + chunk_at<0>(lane / 2, 2 * k + lane % 2));  // lanes and matrices mixed up
    else
      fs::ptx::ldmatrix_x4(fa, a + chunk_at<kDefect>(row, chunk));  // <52>
    fs::ptx::ldmatrix_x2(fb, b + chunk_at<kDefect>(lane % 8, 2 * k + lane / 8 % 2));
    if constexpr (kDefect == 57) {
      if (lane < 31) fs::ptx::mma_s8(sums, fa, fb);  // <57>
    } else {
      fs::ptx::mma_s8(sums, fa, fb);
    }
  }
  for (int i = 0; i < 4; ++i) out[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = sums[i];
}

// --- 4. Assorted
// ----------------------------------------------------------------------------------------------------------

template <int kDefect>
__global__ void assorted(const int* in, int* out) {
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (kDefect == 61) {
    if (thread < 16) reinterpret_cast<int4*>(out)[thread] = reinterpret_cast<const int4*>(in + 1)[thread];  // <61>
  } else if constexpr (kDefect == 62) {
    out[thread] = static_cast<int>(fs::ptx::load16(in + 4 * thread + 2).x);  // <62>
  } else if constexpr (kDefect == 63) {
    FS_DYNAMIC_SHARED(memory);  // the launch gives none
    memory[thread] = 0;
    out[thread] = memory[thread];
  } else if constexpr (kDefect == 64) {
    FS_SHARED(int, words, [64]);
    words[thread] = in[thread];
    out[thread] = words[thread] + words[64 + thread % 2];  // <64>
  } else if constexpr (kDefect == 65) {
    float d[4] = {};
    const uint32_t a[4] = {}, b[4] = {};
    fs::ptx::mma_sp_f16<0>(d, a, b, 0x44444440u);  // <65>
    out[thread] = static_cast<int>(d[0]);
  } else if constexpr (kDefect == 66) {
    FS_SHARED(int, words, [13000]);
    words[thread] = in[thread];
    out[thread] = words[thread];
  } else if constexpr (kDefect == 67) {
    FS_SHARED(unsigned char, bytes, [64]);
    bytes[thread * 2 % 64] = 1;  // <67>
    out[thread] = 0;
  } else {
    out[thread] = in[thread];
  }
}

template <int kDefect>
void run(const int* in, int* out, int n, const int* host) {
  if constexpr (kDefect <= 20)
    launch({dim3(4), dim3(kThreads), 0, nullptr}, sums<kDefect>, in, out, n, host);
  else if constexpr (kDefect <= 30)
    launch({dim3(1), dim3(32), 0, nullptr}, reversed<kDefect>, in, out);
  else if constexpr (kDefect <= 50)
    launch({dim3(1), dim3(kThreads), kStages * kStageBytes, nullptr}, ring_copy<kDefect>, in, out, n);
  else if constexpr (kDefect <= 60)
    launch({dim3(1), dim3(32), 0, nullptr}, small_product<kDefect>, in, out);
  else if constexpr (kDefect == 68)  // a warp of 16 lanes
    launch({dim3(1), dim3(48), 0, nullptr}, small_product<0>, in, out);
  else if constexpr (kDefect == 69)
    launch({dim3(1), dim3(2048), 0, nullptr}, assorted<kDefect>, in, out);
  else
    launch({dim3(1), dim3(kDefect == 65 ? 32 : 64), 0, nullptr}, assorted<kDefect>, in, out);
}

template <int... kDefects>
void run_number(int defect, const int* in, int* out, int n, const int* host, std::integer_sequence<int, kDefects...>) {
  static_cast<void>(((defect == kDefects && (run<kDefects>(in, out, n, host), true)) || ...));
}

}  // namespace

// defect: 0, 22, 41 and 58, 70 are the kernels as they should be.
extern "C" FS_ENTRY const char* defects_run(int defect, const int* in, int* out, int n, const int* host) {
  return fs::simt::guarded([&] { run_number(defect, in, out, n, host, std::make_integer_sequence<int, 71>{}); });
}
