// vnni16 v1, the packed layout of an int8 weight s8[N,K]:
//
//   64-byte pack header (runtime/pack.h): dtype 1, block 16
//   s8 [Np/16][Kp/4][16][4]   Np, Kp: N, K rounded up to 16, 4; padding is zero
//     element (n,k) at ((n/16)*(Kp/4) + k/4)*64 + (n%16)*4 + k%4
//   zeros up to the next multiple of 64 from the start (the run above ends on one)
//   s32 column_sum[Np]        sum over k of the weights of column n
//   zeros up to the next multiple of 64
//
// 8 + 32/K bits a weight. Little-endian, the same on every ISA level and device; readers refuse other versions.
#pragma once
#include <cstdint>
#include <string>

#include "../../runtime/pack.h"

namespace fs {

namespace vnni16 {

inline constexpr uint16_t kFormat = 1;
inline constexpr uint16_t kVersion = 1;
inline constexpr uint32_t kDTypeS8 = 1;
inline constexpr int64_t kHeaderBytes = kPackHeaderBytes;

inline int64_t padded_n(int64_t n) { return (n + 15) / 16 * 16; }
inline int64_t padded_k(int64_t k) { return (k + 3) / 4 * 4; }
inline int64_t weight_bytes(int64_t n, int64_t k) { return padded_n(n) * padded_k(k); }  // a multiple of 64
inline int64_t pack_bytes(int64_t n, int64_t k) {
  return kHeaderBytes + weight_bytes(n, k) + (4 * padded_n(n) + 63) / 64 * 64;
}

inline const int8_t* weights(const uint8_t* pack) { return reinterpret_cast<const int8_t*>(pack + kHeaderBytes); }
inline const int32_t* column_sums(const uint8_t* pack, int64_t n, int64_t k) {
  return reinterpret_cast<const int32_t*>(pack + kHeaderBytes + weight_bytes(n, k));
}

// Element (n, k) of the source at n * stride_n + k * stride_k. `pack` has pack_bytes(n, k); all of it is written.
void pack(const int8_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k, uint8_t* pack);

// The inverse, into a contiguous s8[n, k].
void unpack(const uint8_t* pack, int64_t n, int64_t k, int8_t* weight);

// Empty if `pack` (of `bytes` bytes) is a vnni16 v1 pack of s8[n, k]; else what is wrong, for "... must be a pack: ".
// Reads the header alone.
std::string header_error(const uint8_t* pack, int64_t bytes, int64_t n, int64_t k);

// The k of a vnni16 v1 pack of n outputs, -1 if it is none: after an error, whether x alone does not fit.
int64_t packed_k(const uint8_t* pack, int64_t bytes, int64_t n);

}  // namespace vnni16
}  // namespace fs
