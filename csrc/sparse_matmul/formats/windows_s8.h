// windows_s8 v1 (format 16, dtype 1, block 32): an int8 weight s8[N,K], unstructured zeros, where bytes are cheaper
// than the decoding of a bitmap. A slice of 32 outputs goes in step: a step stores up to 4 weights of each output, of
// the 64 k from 4 * base on, so that one permutation of 64 codes of x finds their x. base is the smallest k not yet
// stored, rounded down to a multiple of 4; an output takes its next weights that are not zero and lie in the window,
// ascending; places that are left hold index 0, value 0. 2 bytes a place and 2 a step. K <= 131071. Every section
// begins at a multiple of 64 from the start, the gaps are zero. Little-endian, the same on every ISA level. Header:
// runtime/pack.h. S = ceil(N/32), T steps in all.
//   u64 offset[S+1]   first step of each slice; offset[S] = T
//   u16 base[T]
//   T times           u8 index[32][4], k - 4 * base of outputs 32 s .. 32 s + 31; s8 value[32][4]
//   s32 sum[32 S]     of the weights of each output
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../../runtime/pack.h"
#include "../int8.h"

namespace fs::sparse_matmul::windows_s8 {

inline constexpr uint16_t kFormat = 16;
inline constexpr uint16_t kVersion = 1;
inline constexpr uint32_t kBlock = 32;

// The pack of s8[n, k], element (n, k) at n * stride_n + k * stride_k; k <= kMaxK.
std::vector<uint8_t> pack(const int8_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k);

// Takes a pack apart; reads the header and offset's last element. Empty if header and size are right; else what is
// wrong, for "... must be a pack: ".
std::string view(const PackHeader& header, const uint8_t* bytes, int64_t size, int8::Windows* out);

// As view(), then every byte: empty only for what pack() writes.
std::string validate(const PackHeader& header, const uint8_t* bytes, int64_t size, int8::Windows* out);

// The inverse of pack(), into a contiguous s8[n, k]. Any bytes behind a right header and total give some weight.
void unpack(const int8::Windows& pack, int8_t* weight);

}  // namespace fs::sparse_matmul::windows_s8
