// blocks v1 (format 9, block 256 * R + C): any number of rows, a weight whose zeros come in blocks of R outputs x C k,
// both from a multiple of R and C: 1x4, 4x4, 8x8, 16x16 or 16x1. A block is stored, zeros and all, if anything in it is
// not zero. 4 bytes a stored weight, 2 a block, and padding. K <= 65536.
//   Outputs lie in chunks of W (tile_width in sparse_matmul.h): N in an even number of equal parts of at most 256,
//   rounded up to a multiple of 16; the last one has what is left. The rows of blocks of a chunk, sorted by their
//   number of blocks (descending; ties: ascending), stand G = 16/R side by side in slices of 16 outputs;
//   S = ceil(N/16). Rows beyond N have no blocks.
//   u64 offset[S+1]           first step of each slice; offset[S] = steps
//   u8 order[S][G]            row of blocks in the chunk: outputs of the chunk R * order + 0 .. R-1
//   u8 count[S][B][G]         its blocks in each 128 k; B = ceil(K/128)
//   u16 index[steps][G]       first k of a block: step i of a slice has the i-th block of each row, k ascending; a row
//                             that has ended: 0
//   f32 value[steps][C][16]   weight (r, c) of the block at place g: [c][R * g + r]; 0 beyond N, K and the row's end
#pragma once
#include "packed_format.h"

namespace fs::sparse_matmul::formats {

extern const PackedFormat kBlocks1x4, kBlocks4x4, kBlocks8x8, kBlocks16x16, kBlocks16x1;

}  // namespace fs::sparse_matmul::formats
