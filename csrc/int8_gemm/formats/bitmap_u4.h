// bitmap_u4 v1 (format 18, dtype 5, block G): a symmetric u4 weight (u4.h) whose zeros are left out, for few rows of x.
// About 0.54 d + 1/8 + 2/G bytes a weight, d the density: 0.79 of u4 at 50% zeros, 0.6 at 70% in groups of 128. Every
// section begins at a multiple of 64 from the start, the gaps are zero. Little-endian, the same on every ISA level.
// Header: runtime/pack.h; nonzeros counts the weights that are stored. Kp: K rounded up to G; P = ceil(N/16),
// C = Kp/8, S = Kp/G.
//   u64 offset[P+1]      first byte of the codes of each panel of 16 columns; offset[P]: where they end
//   u64 mask[P][C][2]    bit 4j+i of mask[p][c][h]: weight (16p+j, 8c+4h+i) is not zero, and stored; beyond N and K: 0.
//                        A cell of u4 in the same order: h = 0 is its low nibbles, h = 1 its high ones
//   f16 scale[P][S][16]  as in u4
//   u8 code[]            by panel and cell as many bytes as the fuller of its two masks has bits. Byte i holds in its
//                        low nibble the weight of the i-th bit of mask 0, in its high nibble that of mask 1, in two's
//                        complement, never 0; 0 where that mask has no i-th bit
//   u8 zero[256]         behind the codes rounded up to 64: room for reading ahead
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../weight_only.h"
#include "u4.h"

namespace fs::bitmap_u4 {

inline constexpr uint16_t kFormat = 18;
inline constexpr uint16_t kVersion = 1;
inline constexpr int64_t kRoom = 256;  // four cells, the last one's load included

// The pack of what a symmetric u4 pack holds.
std::vector<uint8_t> pack(const u4::Layout& l, const uint8_t* u4_pack);

// Takes a pack apart; reads the header alone. Empty if header and size are right; else what is wrong, for "... must be
// a pack: ". Only after "" is *out set.
std::string header_error(const uint8_t* pack, int64_t bytes, int8_gemm::BitmapU4* out);

// As header_error(), then every byte: empty only for what pack() writes.
std::string content_error(const uint8_t* pack, int64_t bytes);

// The inverse of pack(): a u4 pack of layout(w).bytes(), the padding of columns included. Any bytes behind a right
// header give some pack.
u4::Layout layout(const int8_gemm::BitmapU4& w);
std::vector<uint8_t> unpack(const int8_gemm::BitmapU4& w, int64_t nonzeros);

// The cells of one panel of columns as u4 has them: w.cells() * 64 bytes. The plain version of BitmapKernels::cells.
void cells(const int8_gemm::BitmapU4& w, int64_t panel, uint8_t* out);

}  // namespace fs::bitmap_u4
