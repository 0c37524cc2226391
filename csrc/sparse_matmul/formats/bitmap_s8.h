// bitmap_s8 v1 (format 11, dtype 1, block 16): an int8 weight s8[N,K] for few rows of x. d + 1/8 bytes a weight, d the
// density, and 4/K for the sums. K <= 131071. Every section begins at a multiple of 64 from the start, the gaps are
// zero. Little-endian, the same on every ISA level. Header: runtime/pack.h. P = ceil(N/16), S = ceil(K/4).
//   u64 offset[P+1]      first value of each panel of 16 outputs; offset[P] = non-zeros
//   u64 mask[P][S]       bit 4j+i of mask[p][s]: weight (16p+j, 4s+i) is not zero, and stored; beyond N and K: 0.
//                        A tile of vnni16 (int8_gemm/formats/vnni16.h) in the same order
//   s8 value[non-zeros]  by panel, s, bit
//   s8 zero[512]         room for reading ahead
//   s32 sum[16 P]        of the weights of each output
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../../runtime/pack.h"
#include "../int8.h"

namespace fs::sparse_matmul::bitmap_s8 {

inline constexpr uint16_t kFormat = 11;
inline constexpr uint16_t kVersion = 1;
inline constexpr uint32_t kBlock = 16;

// The pack of s8[n, k], element (n, k) at n * stride_n + k * stride_k; k <= kMaxK.
std::vector<uint8_t> pack(const int8_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k);

// Takes a pack apart; reads the header alone. Empty if header and size are right; else what is wrong, for "... must be
// a pack: ".
std::string view(const PackHeader& header, const uint8_t* bytes, int64_t size, int8::Bitmap* out);

// As view(), then every byte: empty only for what pack() writes.
std::string validate(const PackHeader& header, const uint8_t* bytes, int64_t size, int8::Bitmap* out);

// The inverse of pack(), into a contiguous s8[n, k]. Any bytes behind a right header give some weight.
void unpack(const int8::Bitmap& pack, int8_t* weight);

}  // namespace fs::sparse_matmul::bitmap_s8
