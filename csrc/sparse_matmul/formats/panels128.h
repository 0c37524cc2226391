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
#include "../../runtime/dtype.h"
#include "packed_format.h"

namespace fs::sparse_matmul::formats {

extern const PackedFormat kPanels128Format;

}  // namespace fs::sparse_matmul::formats

// Those of bfloat16, as the other formats of 16-bit weights have it.
namespace fs::sparse_matmul::panels16 {

struct Weight {
  int64_t n, k;
  DType dtype;  // bf16
  Pack pack;
};

// Whether a header is of this and not of a float32 panels128.
inline bool is_panels16(const PackHeader& h) { return h.format == kPanels128 && h.dtype == 4; }

// The pack of the bits of a weight [n, k], element (n, k) at n * stride_n + k * stride_k.
std::vector<uint8_t> pack(const uint16_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k);

// Takes a pack apart and looks at every byte: empty only for what pack() writes, apart from the values.
std::string validate(const uint8_t* bytes, int64_t size, Weight* out);

// The inverse of pack(), into a contiguous [n, k]; the pack has passed validate().
void unpack(const Weight& pack, uint16_t* weight);

}  // namespace fs::sparse_matmul::panels16
