// sell16 v1 (format 3, block 16): few rows, from about 80% zeros. 6 bytes a non-zero, and padding. K <= 65536.
//   u64 offset[S+1]           S = ceil(N/16); first step of each slice of 16 rows; offset[S] = steps
//   u32 row[S][16]            outputs in descending order of non-zeros (ties: ascending); 2^32-1 fills the last slice
//   step[steps]               96 bytes each: f32 value[16], u16 k[16], lane = place in row[S]; the i-th step of a slice
//                             holds the i-th non-zero of each row, k ascending; a row that has ended: value 0, k 0
#pragma once
#include "packed_format.h"

namespace fs::sparse_matmul::formats {

extern const PackedFormat kSell16Format;

}  // namespace fs::sparse_matmul::formats
