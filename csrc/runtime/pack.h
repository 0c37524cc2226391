// The header of every pack: a uint8 vector that holds a weight in some packed layout. Torch-free.
//
// 64 bytes: magic "fspk" | u16 format | u16 version | u32 dtype | u32 block | s64 n | s64 k | s64 nonzeros |
// u64 bytes (of the whole pack) | 16 bytes zero. Little-endian. The payload follows at a multiple of 64.
#pragma once
#include <cstdint>

namespace fs {

struct PackHeader {
  char magic[4];
  uint16_t format;  // int8_gemm: 1 vnni16, 6 u4, 18 bitmap_u4; sparse_matmul: 2 bitmap32, 3 sell16, 4 panels128,
                    // 5 nm24, 8 sell8, 9 blocks, 10 nm, 11 bitmap_s8, 12 blocks_s8, 13 pair, 14 blocks16,
                    // 15 structure, 16 windows_s8, 17 sell4
  uint16_t version;
  uint32_t dtype;  // 1: s8, 2: f32, 3: f16, 4: bf16, 5: u4 around 8, 6: u4 with zero points
  uint32_t block;  // of the format's own meaning
  int64_t n, k;
  int64_t nonzeros;
  uint64_t bytes;
  uint8_t zero[16];
};
static_assert(sizeof(PackHeader) == 64, "the header is 64 bytes");

inline constexpr int64_t kPackHeaderBytes = sizeof(PackHeader);
inline constexpr int64_t kLargestSide = int64_t{1} << 31;  // n and k lie below

}  // namespace fs
