// nm v1 (format 10, block 256 * N + M): float32, at most N of every M consecutive k (from a multiple of M) not zero:
// 1:4, 2:4 or 4:8. 4 1/4 bytes a stored weight (4:8: 4 1/2), of which there are N/M of all. (nm24 is another layout: of
// 16 bits, for CUDA.)
//   A position in a group of M k has F = 2 bits (4:8: 4), a word of 32 bits 32/F of them, those of T = 32/(F*N) groups:
//   16 (1:4), 8 (2:4) or 2 (4:8), which are 64, 32 or 16 k.
//   run[ceil(rows/16)][ceil(K/(T*M))]    what 16 outputs keep of T*M k:
//     u32 word[16]            of each output: bits F*i .. F*i+F-1 are the position of its value i
//     f32 value[T*N][16]      value i belongs to group i/N; positions ascend in a group
// Kept are those that are not zero, and of the others as many as are needed to make N, the lowest k first, as +0; what
// lies beyond the weight counts as zero.
#pragma once
#include "packed_format.h"

namespace fs::sparse_matmul::formats {

extern const PackedFormat kNm14, kNm24, kNm48;

}  // namespace fs::sparse_matmul::formats
