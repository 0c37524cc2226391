// panels128 v1 (format 4, block 128): many rows. 5 bytes a non-zero and 512 bytes per 256 x 128 weights.
//   u64 offset[C+1]           C = ceil(N/256); first value of each chunk of 256 outputs; offset[C] = non-zeros
//   u8 order[C][ceil(K/128)][2][256]   rows of the chunk in descending order of non-zeros in this block of k (ties:
//                             ascending; all of 0 .. 255, also those >= N), then their numbers of non-zeros
//   u8 index[non-zeros]       k % 128, by chunk, block, place in order, k
//   u8 zero[512]              room
//   f32 value[non-zeros]
//   f32 zero[512]             room
#pragma once
#include "packed_format.h"

namespace fs::sparse_matmul::formats {

extern const PackedFormat kPanels128Format;

}  // namespace fs::sparse_matmul::formats
