// panels128 v1 (format 4, block 192): many rows. The outputs are cut into C chunks of W, k into B blocks of 192. In a
// chunk and a block the rows are sorted by non-zeros, 8 to a group, and the groups are stored step by step: step i
// holds the i-th non-zero of each of the 8 rows. 5 bytes a non-zero, and padding: about 1% at 50% zeros, 3% at 95%.
//   W = panel_width(N)        at most 256, a multiple of 8; C = ceil(N/W), B = ceil(K/192)
//   u64 offset[C+1]           first step of each chunk; offset[C] = steps
//   u8 order[C][B][W+W/8]     the rows of the chunk, 0 .. W-1 (also those >= N), in descending order of non-zeros in
//                             this block (ties: ascending), then the steps of each group: the non-zeros of its first
//                             row
//   u8 index[steps][8]        k % 192, by chunk, block, group, step, row of the group; k of a row ascends. A row that
//                             has ended: its last index again, 0 if it has none
//   f32 value[steps][8]       as index; a row that has ended: +0
// Of bfloat16 (header dtype 4): u16 value[steps][8], 3 bytes a non-zero.
#pragma once
#include "packed_format.h"

namespace fs::sparse_matmul::formats {

extern const PackedFormat kPanels128Format, kPanels128Bf16;

}  // namespace fs::sparse_matmul::formats
