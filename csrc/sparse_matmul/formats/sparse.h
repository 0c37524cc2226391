// The packed layouts of a sparse float32 weight f32[N,K]. All begin with the 64-byte header (runtime/pack.h, dtype 2);
// every section below begins at a multiple of 64 from the start, the gaps are zero. Little-endian, the same on every
// ISA level. A value is stored if its bits are not those of +0 or -0 (so a NaN or an infinity is stored).
//
// bitmap32 v1 (format 2, block 32): few rows of x, up to about 80% zeros. 4d + 1/8 bytes a weight, d the density.
//   u64 offset[B+1]           B = ceil(N/32); first value of each block of 32 outputs; offset[B] = non-zeros
//   u32 mask[B][K]            bit j of mask[b][k]: weight (32b+j, k) is stored; bits of outputs >= N are 0
//   f32 value[non-zeros]      by block, k, output
//   f32 zero[512]             room for reading ahead
//
// sell16 v1 (format 3, block 16): few rows, from about 80% zeros. 6 bytes a non-zero, and padding. K <= 65536.
//   u64 offset[S+1]           S = ceil(N/16); first step of each slice of 16 rows; offset[S] = steps
//   u32 row[S][16]            outputs in descending order of non-zeros (ties: ascending); 2^32-1 fills the last slice
//   step[steps]               96 bytes each: f32 value[16], u16 k[16], lane = place in row[S]; the i-th step of a slice
//                             holds the i-th non-zero of each row, k ascending; a row that has ended: value 0, k 0
//
// panels128 v1 (format 4, block 128): many rows. 5 bytes a non-zero and 512 bytes per 256 x 128 weights.
//   u64 offset[C+1]           C = ceil(N/256); first value of each chunk of 256 outputs; offset[C] = non-zeros
//   u8 order[C][ceil(K/128)][2][256]   rows of the chunk in descending order of non-zeros in this block of k (ties:
//                             ascending; all of 0 .. 255, also those >= N), then their numbers of non-zeros
//   u8 index[non-zeros]       k % 128, by chunk, block, place in order, k
//   u8 zero[512]              room
//   f32 value[non-zeros]
//   f32 zero[512]             room
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../../runtime/pack.h"
#include "../sparse_matmul.h"

namespace fs::sparse_matmul::formats {

enum Format : int { kBitmap32 = 2, kSell16 = 3, kPanels128 = 4 };

inline constexpr uint16_t kVersion = 1;
inline constexpr uint32_t kDTypeF32 = 2;

// The pack of f32[n, k], element (n, k) at n * stride_n + k * stride_k. k <= kMaxSellK for sell16.
std::vector<uint8_t> pack(Format format, const float* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k);

// Takes a pack apart. Empty if header and size are right; else what is wrong, for "... must be a pack: ". Reads the
// header, and offset's last element: what it costs is in docs/kernels/sparse_matmul.md.
std::string view(const uint8_t* bytes, int64_t size, Pack* out);

// The same for a bitmap32 pack in the memory of a GPU, whose header was copied to the host; `bytes` is not read.
std::string view_bitmap32(const PackHeader& header, const uint8_t* bytes, int64_t size, Pack* out);

// As view(), then every index, count, offset, mask and gap: empty only for what pack() writes, apart from the values.
std::string validate(const uint8_t* bytes, int64_t size);

// The inverse of pack(), into a contiguous f32[n, k]; the pack has passed validate().
void unpack(const Pack& pack, float* weight);

}  // namespace fs::sparse_matmul::formats
