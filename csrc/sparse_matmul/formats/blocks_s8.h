// blocks_s8 v1 (format 12, dtype 1, block 256 R + 4): an int8 weight s8[N,K] for many rows of x, in blocks of R outputs
// x 4 k, R = 1 or 4 (block 260 or 1028), of which those with a weight that is not zero are stored. 4 R + 1 bytes a
// stored block, and 512/R bytes per 256 x 512 weights. K <= 131071. Every section begins at a multiple of 64 from the
// start, the gaps are zero. Little-endian, the same on every ISA level. Header: runtime/pack.h; its non-zeros count
// weights. C = ceil(N/256) chunks of outputs, B = ceil(K/512) blocks of k, U = 256/R units of R outputs in a chunk.
//   u64 offset[C+1]        first stored block of each chunk; offset[C] = stored blocks
//   u8 order[C][B][2][U]   units of the chunk in descending order of stored blocks in this block of k (ties: ascending;
//                          all of 0 .. U-1, also those beyond N), then their numbers of stored blocks
//   u8 index[stored]       (k % 512) / 4, by chunk, block of k, place in order, k
//   u8 zero[512]           room
//   s8 value[stored][R][4] weight (256 c + R u + r, 4 g + i) at [r][i]; beyond N and K: 0
//   s8 zero[512]           room
//   s32 sum[256 C]         of the weights of each output
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../../runtime/pack.h"
#include "../int8.h"

namespace fs::sparse_matmul::blocks_s8 {

inline constexpr uint16_t kFormat = 12;
inline constexpr uint16_t kVersion = 1;

inline constexpr uint32_t block_code(int64_t rows) { return static_cast<uint32_t>(256 * rows + int8::kTileK); }

// The pack of s8[n, k], element (n, k) at n * stride_n + k * stride_k, in blocks of `rows` (1 or 4) x 4; k <= kMaxK.
std::vector<uint8_t> pack(const int8_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k, int64_t rows);

// Takes a pack apart; reads the header and offset's last element. Empty if header and size are right; else what is
// wrong, for "... must be a pack: ".
std::string view(const PackHeader& header, const uint8_t* bytes, int64_t size, int8::Blocks* out);

// As view(), then every byte: empty only for what pack() writes.
std::string validate(const PackHeader& header, const uint8_t* bytes, int64_t size, int8::Blocks* out);

// The inverse of pack(), into a contiguous s8[n, k]. Any bytes behind a right header and total give some weight.
void unpack(const int8::Blocks& pack, int8_t* weight);

}  // namespace fs::sparse_matmul::blocks_s8
