// Few rows of x times packed weights, on CUDA: how a warp reads 32 columns of weights and multiplies them by 8 rows of
// codes. The weights are the A of mma (16 rows: columns of the product), the codes its B (8 columns: rows of x), so
// that up to 8 rows nothing is padded but the rows of x that there are not. Device code.
//
// Lane 4g + t holds columns 4g .. 4g+3 of the 32: in panel g / 4, where the four lie beside each other in 16 bytes,
// and of every 32 k the 8 from 8t on. mma sums over k in any order, as long as A and B agree: its 4 k of register i/2
// are ours 8t + 4 * (i / 2), its row g + 8 * (i % 2) is our column 4g + 2 * set + i % 2, with two products, set 0
// and 1. So every byte of weights is read once, by 16-byte loads that go straight to the registers of mma, and neither
// weights nor codes pass through shared memory.
#pragma once
#include "../../runtime/cuda/device.h"

namespace fs::int8_gemm::sm80 {

constexpr int kFewColumns = 32;  // of a block
constexpr int kMmaK = 32;        // of one mma
constexpr int kTurnSteps = 4;    // that a warp loads at once: weights of 4 KB (s8) or 2 KB (u4) are then under way
constexpr int kTurnK = kMmaK * kTurnSteps;

struct Words {
  uint32_t at[4];
};

__device__ __forceinline__ Words load_words(const void* p, bool inside) {
  Words w{};
  if (inside) {
    const uint4 v = ptx::load16_once(p);
    memcpy(&w, &v, 16);
  }
  return w;
}

// vnni16, 4 k of 16 columns in 64 bytes: two loads a step.
struct S8Weights {
  static constexpr int kLoads = 2;
  const uint8_t* at;  // this lane's 16 bytes of the first 4 k
  int cells;          // of 64 bytes, that there are

  __device__ __forceinline__ void load(int step, Words (&raw)[kLoads]) const {
    const int first = 8 * step + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) raw[i] = load_words(at + int64_t{64} * (first + i), first + i < cells);
  }
  __device__ __forceinline__ static void operand(const Words (&raw)[kLoads], int set, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = raw[i / 2].at[2 * set + i % 2];
  }
};

// u4, 8 k of 16 columns in 64 bytes: one load a step; the codes 0 .. 15 as they are.
struct U4Weights {
  static constexpr int kLoads = 1;
  const uint8_t* at;
  int cells;

  __device__ __forceinline__ void load(int step, Words (&raw)[kLoads]) const {
    const int cell = 4 * step + static_cast<int>(threadIdx.x) % 4;
    raw[0] = load_words(at + int64_t{64} * cell, cell < cells);
  }
  __device__ __forceinline__ static void operand(const Words (&raw)[kLoads], int set, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = raw[0].at[2 * set + i % 2] >> (4 * (i / 2)) & 0x0f0f0f0fu;
  }
};

// Rows of codes, zero where there are none. Row g of tile i is row g + 8 * i.
template <int kTiles>
struct Codes {
  const int8_t* at[kTiles];  // this lane's 8 k of the first step; null: no such row
  int64_t bytes;             // of a row, a multiple of 16

  __device__ __forceinline__ void load(int step, uint2 (&b)[kTiles]) const {
    const int64_t k = int64_t{kMmaK} * step;
    const bool inside = k + static_cast<int>(threadIdx.x) % 4 * 8 < bytes;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      b[i] = inside && at[i] != nullptr ? *reinterpret_cast<const uint2*>(at[i] + k) : make_uint2(0, 0);
  }
};

template <int kTiles>
__device__ __forceinline__ Codes<kTiles> codes_of(const int8_t* codes, int64_t m, int64_t stride, int64_t bytes) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Codes<kTiles> c{{}, bytes};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int64_t row = lane / 4 + 8 * i;
    c.at[i] = row < m ? codes + row * stride + lane % 4 * 8 : nullptr;
  }
  return c;
}

// The weights of a turn: loaded before the products of the turn before it, for they come from DRAM. Codes come from L2,
// and are loaded in the turn that needs them, before the weights of the next: registers for two blocks an SM are left.
template <class Weights>
struct Turn {
  Words weights[kTurnSteps][Weights::kLoads];

  __device__ __forceinline__ void load(const Weights& w, int turn) {
#pragma unroll
    for (int i = 0; i < kTurnSteps; ++i) w.load(turn * kTurnSteps + i, weights[i]);
  }
};
template <int kTiles>
struct TurnCodes {
  uint2 codes[kTurnSteps][kTiles];

  __device__ __forceinline__ void load(const Codes<kTiles>& c, int turn) {
#pragma unroll
    for (int i = 0; i < kTurnSteps; ++i) c.load(turn * kTurnSteps + i, codes[i]);
  }
};

// at[tile][set][i]: row 8 * tile + 2t + i % 2, column 4g + 2 * set + i / 2.
template <class T, int kTiles>
struct FewSums {
  T at[kTiles][2][4];
};

template <class Weights, int kTiles>
__device__ __forceinline__ void multiply_step(const Turn<Weights>& turn, const TurnCodes<kTiles>& codes, int step,
                                              FewSums<int32_t, kTiles>& sums) {
#pragma unroll
  for (int set = 0; set < 2; ++set) {
    uint32_t a[4];
    Weights::operand(turn.weights[step], set, a);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint32_t b[2] = {codes.codes[step][i].x, codes.codes[step][i].y};
      ptx::mma_s8(sums.at[i][set], a, b);
    }
  }
}

// Rows of the sums in shared memory are so many words apart: then neither the stores of sums nor the loads of rows meet
// in a bank.
constexpr int kFewPitch = 36;

// This warp's sums to shared memory, rows of 32 columns.
template <class T, int kTiles>
__device__ __forceinline__ void store_sums(const FewSums<T, kTiles>& sums, T (&rows)[8 * kTiles][kFewPitch]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T four[4] = {sums.at[tile][0][i], sums.at[tile][0][2 + i], sums.at[tile][1][i], sums.at[tile][1][2 + i]};
      uint4 bits;
      memcpy(&bits, four, 16);
      ptx::store16(&rows[8 * tile + lane % 4 * 2 + i][lane / 4 * 4], bits);
    }
}

}  // namespace fs::int8_gemm::sm80
