// nm24 v1 (format 5, block 4): a float16 or bfloat16 weight [N,K] of which at most 2 of every 4 consecutive k (from a
// multiple of 4) are not zero. 1 + 1/8 bytes a weight, 9/16 of dense. For mma.sp; runs on CUDA only. Every section
// begins at a multiple of 64. Little-endian, the same on every machine. Header: runtime/pack.h, dtype 3 (f16) or 4
// (bf16).
//   Np, Kp: N, K rounded up to 16, 64; what lies beyond N or K counts as zero
//   u16 value[Np][Kp/2]               values 2i and 2i+1 of a row: the kept two of k 4i .. 4i+3, the lower k first
//   u32 position[Np/16][Kp/64][8][4]  word (g,t) of a block of 16 rows x 64 k has k 16t .. 16t+15: of row g in its low
//                                     half, of row g+8 in its high half; 4 bits for every four k, the lowest k in the
//                                     lowest bits: the first kept k in the lower two, the second in the upper two.
//                                     So word [lane] of a block is what a lane hands to mma.sp (runtime/cuda/ptx.h).
// Kept are those that are not zero (of either sign; a NaN or an infinity is kept), and of the others as many as are
// needed to make two, the lowest k first; a value that is zero is stored as +0.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../../runtime/dtype.h"
#include "../../runtime/pack.h"

namespace fs::sparse_matmul::nm24 {

inline constexpr int kFormat = 5;
inline constexpr uint16_t kVersion = 1;
inline constexpr uint32_t kBlock = 4;
inline constexpr int64_t kRows = 16, kColumns = 64;  // what a block of 32 words of positions covers

// A pack, taken apart; the pointers may be device pointers.
struct Weight {
  int64_t n, k;
  DType dtype;  // bf16 or f16
  const uint16_t* value;
  const uint32_t* position;
};

constexpr int64_t padded_n(int64_t n) { return (n + kRows - 1) / kRows * kRows; }
constexpr int64_t padded_k(int64_t k) { return (k + kColumns - 1) / kColumns * kColumns; }
constexpr int64_t pack_bytes(int64_t n, int64_t k) { return kPackHeaderBytes + padded_n(n) * padded_k(k) / 8 * 9; }

// Four k of a row where more than two are not zero: {row, first k, how many}; row -1: there are none.
struct NotSparse {
  int64_t row, k;
  int count;
};

// The pack of the bits of a weight [n, k], element (n, k) at n * stride_n + k * stride_k, `dtype` bf16 or f16. Empty if
// the weight is not 2:4; *where says where, then.
std::vector<uint8_t> pack(const uint16_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k, DType dtype,
                          NotSparse* where);

// Takes a pack apart by its header alone, which lies on the host; `bytes` is not read. Empty if header and size are
// right; else what is wrong, for "... must be a pack: ".
std::string view(const PackHeader& header, const uint8_t* bytes, int64_t size, Weight* out);

// The same for a pack on the host, then every byte: empty only for what pack() writes.
std::string validate(const uint8_t* bytes, int64_t size, Weight* out);

// The inverse of pack(), into a contiguous [n, k]. Any bytes of values and positions give some weight.
void unpack(const Weight& pack, uint16_t* weight);

}  // namespace fs::sparse_matmul::nm24
