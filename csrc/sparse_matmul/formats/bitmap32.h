// bitmap32 v1 (format 2, block 32): few rows of x, up to about 80% zeros. 4d + 1/8 bytes a weight, d the density.
//   u64 offset[B+1]           B = ceil(N/32); first value of each block of 32 outputs; offset[B] = non-zeros
//   u32 mask[B][K]            bit j of mask[b][k]: weight (32b+j, k) is stored; bits of outputs >= N are 0
//   f32 value[non-zeros]      by block, k, output
//   f32 zero[512]             room for reading ahead
// With dtype 3 (f16) or 4 (bf16) values have 16 bits: bitmap16.h.
#pragma once
#include "packed_format.h"

namespace fs::sparse_matmul::formats {

extern const PackedFormat kBitmap32Format;

// The most values of so many bytes that a pack of `size` bytes has room for; below 0 if it has none.
int64_t bitmap_room(int64_t n, int64_t k, int64_t value_bytes, int64_t size);

}  // namespace fs::sparse_matmul::formats
