// sell8 v1 (format 8, block 64): few rows, from about 70% zeros. 5 bytes a stored value. K <= 65536.
//   u64 offset[S+1]           S = ceil(N/64); first group of each slice of 64 rows; offset[S] = groups
//   u32 row[S][64]            outputs in descending order of non-zeros (ties: ascending); 2^32-1 fills the last slice
//   u16 base[groups][4]       of each step the k at which its window of 64 k begins, divided by 16
//   group[groups]             1280 bytes each, four steps: u8 index[64][4], by lane, then step; f32 value[4][64]; lane
//   =
//                             place in row[S], k = 16 * base + index, index < 64
// A row takes part in a step if its next non-zero lies in the window, which begins at the smallest next k of the slice,
// rounded down to a multiple of 16; else, and when it has ended, its value and index are 0. So k ascends in every lane,
// and a step needs 64 neighbouring x: registers can hold them. The last group of a slice is filled by steps of zeros.
#pragma once
#include "packed_format.h"

namespace fs::sparse_matmul::formats {

extern const PackedFormat kSell8Format;

}  // namespace fs::sparse_matmul::formats
