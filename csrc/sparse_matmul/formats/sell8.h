// sell8 v1 (format 8, block R): few rows, from about 50% zeros. 5 bytes a stored value, of bfloat16 3. K <= 65536.
//   sell8: R = 64. sell8x32: R = 32, for several rows of x, and for outputs of unequal length.
//   u64 offset[S+1]           S = ceil(N/R); first group of each slice of R rows; offset[S] = groups
//   u32 row[S][R]             outputs in descending order of non-zeros (ties: ascending); 2^32-1 fills the last slice
//   u16 base[groups][4]       of each step the k at which its window of R k begins, divided by 16
//   group[groups]             20 R bytes each, four steps: u8 index[R][4], by lane, then step; f32 value[4][R]; lane =
//                             place in row[S], k = 16 * base + index, index < R
// A row takes part in a step if its next non-zero lies in the window, which begins at the smallest next k of the slice,
// rounded down to a multiple of 16; else, and when it has ended, its value and index are 0. So k ascends in every lane,
// and a step needs R neighbouring x: registers can hold them. The last group of a slice is filled by steps of zeros.
// With dtype 4 (bf16) a group has 12 R bytes, and its values are u16 value[4][R/32][16][2], lane 32 i + 16 h + j at
// [i][j][h]: a dword holds the values of two lanes, which a shift and a mask widen.
// sell8x16 (R = 16): outputs of uneven length. The longest ones lie in narrow slices of 16, whose windows have 32 k,
// the others in slices of 64, so that a few long ones do not set the steps of many.
//   u64 narrow                slices of 16: of the numbers that N allows, the least one with the least 7 * (the longest
//                             outputs of the slices of 16) + 16 * (those of the slices of 64), counted in non-zeros
//   u64 offset[narrow+1]      as above, of the narrow slices; then the same of the slices of 64, which begins at 0
//   again u32 row                   [narrow][16], then [slices of 64][64]; base and group alike: first all of the
//   narrow ones
// float32 alone.
#pragma once
#include "packed_format.h"

namespace fs::sparse_matmul::formats {

extern const PackedFormat kSell8Format, kSell8x32Format, kSell8x16Format, kSell8Bf16, kSell8x32Bf16;

}  // namespace fs::sparse_matmul::formats
