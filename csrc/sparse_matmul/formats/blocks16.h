// blocks16 v1 (format 14, block b = 32 or 64): a float16 or bfloat16 weight [N,K] cut into squares of b outputs x b k,
// of which those are stored that hold anything but zeros. 2d + 4d/b^2 bytes a weight, d the part of the squares that is
// stored. For tensor cores and many rows; runs on CUDA only. Every section begins at a multiple of 64 from the start,
// the gaps are zero. Little-endian, the same on every machine. Header: runtime/pack.h, dtype 3 (f16) or 4 (bf16).
//   R, C: N, K divided by b, rounded up; S: squares stored, as many as the pack's size has room for
//   u32 order[R]       rows of squares by descending number of stored ones (ties: ascending): the longest begin first
//   u32 offset[R+1]    the first square of each row of squares; offset[R] = S
//   u32 column[S]      which square of its row, from 0, ascending in a row
//   u16 value[S][b][b] by output, k; what lies beyond N or K is zero, and so is a zero of either sign (+0)
// b is 64 where squares of 64 store at most 5/4 of the weights that squares of 32 do, else 32 (kCoarser).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../../runtime/dtype.h"
#include "../../runtime/pack.h"

namespace fs::sparse_matmul::blocks16 {

inline constexpr int kFormat = 14;
inline constexpr uint16_t kVersion = 1;
inline constexpr int kFine = 32, kCoarse = 64;
// A kernel multiplies squares of 64 about so much faster than those of 32 (counted, docs/kernels/sparse_matmul.md).
inline constexpr int64_t kCoarser[2] = {5, 4};

// A pack, taken apart; the pointers may be device pointers.
struct Weight {
  int64_t n, k;
  DType dtype;     // bf16 or f16
  int block;       // kFine or kCoarse
  int64_t stored;  // squares
  const uint32_t* order;
  const uint32_t* offset;
  const uint32_t* column;
  const uint16_t* value;
};

constexpr int64_t squares(int64_t side, int64_t block) { return (side + block - 1) / block; }

// The pack of the bits of a weight [n, k], element (n, k) at n * stride_n + k * stride_k, `dtype` bf16 or f16.
std::vector<uint8_t> pack(const uint16_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k,
                          DType dtype);

// Takes a pack apart by its header and size alone; `bytes` is not read. Empty if they are right; else what is wrong,
// for "... must be a pack: ".
std::string view(const PackHeader& header, const uint8_t* bytes, int64_t size, Weight* out);

// The same for a pack on the host, then every byte: empty only for what pack() writes.
std::string validate(const uint8_t* bytes, int64_t size, Weight* out);

// The inverse of pack(), into a contiguous [n, k]. Any bytes behind the header give some weight.
void unpack(const Weight& pack, uint16_t* weight);

}  // namespace fs::sparse_matmul::blocks16
