// sell4 v1 (format 16, block 16): few rows, AVX2, from about 50% zeros. 4 5/8 bytes a stored value. K <= 65536.
//   u64 offset[S+1]           S = ceil(N/16); first group of each slice of 16 rows; offset[S] = groups
//   u32 row[S][16]            outputs in descending order of non-zeros (ties: ascending); 2^32-1 fills the last slice
//   u16 base[groups][8]       of each step the k at which its window of 16 k begins
//   group[groups]             576 bytes each, eight steps: u32 place[16], by lane: bits 3j to 3j+2 are the low three of
//                             step j's index, bit 31-j its highest; f32 value[8][16]; lane = place in row[S],
//                             k = base + index, index < 16
// A row takes part in a step if its next non-zero lies in the window, which begins at the smallest next k of the slice;
// else, and when it has ended, its value and index are 0. So k ascends in every lane, and a step needs 16 neighbouring
// x: two registers of AVX2 hold them. The last group of a slice is filled by steps of zeros.
#pragma once
#include "packed_format.h"

namespace fs::sparse_matmul::formats {

extern const PackedFormat kSell4Format;

}  // namespace fs::sparse_matmul::formats
