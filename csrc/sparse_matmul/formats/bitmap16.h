// bitmap32 v1 (format 2, block 32) of float16 or bfloat16: the layout of bitmap32.h with values of 16 bits, header
// dtype 3 (f16) or 4 (bf16). 2d + 1/8 bytes a weight, d the density. Few rows of x. float16 runs on CUDA only.
//   u64 offset[B+1], u32 mask[B][K]   as there
//   u16 value[non-zeros]              by block, k, output; never +0 or -0
//   u16 zero[512]                     room for reading ahead
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../../runtime/dtype.h"
#include "../../runtime/pack.h"

namespace fs::sparse_matmul::bitmap16 {

inline constexpr int kFormat = 2;

// A pack, taken apart; the pointers may be device pointers.
struct Weight {
  int64_t n, k;
  DType dtype;             // bf16 or f16
  int64_t total;           // stored values, behind which are 512 zeros
  const uint64_t* offset;  // first value of each block of 32 outputs
  const uint32_t* mask;    // [blocks][k], bit j: output 32 * block + j
  const uint16_t* value;
};

// Whether a header is of this and not of a float32 bitmap32.
inline bool is_bitmap16(const PackHeader& h) { return h.format == kFormat && (h.dtype == 3 || h.dtype == 4); }

// The pack of the bits of a weight [n, k], element (n, k) at n * stride_n + k * stride_k, `dtype` bf16 or f16.
std::vector<uint8_t> pack(const uint16_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k,
                          DType dtype);

// Takes a pack apart by its header alone, which lies on the host; `bytes` is not read. Empty if header and size are
// right; else what is wrong, for "... must be a pack: ".
std::string view(const PackHeader& header, const uint8_t* bytes, int64_t size, Weight* out);

// The same for a pack on the host, then every byte: empty only for what pack() writes, apart from the values.
std::string validate(const uint8_t* bytes, int64_t size, Weight* out);

// The inverse of pack(), into a contiguous [n, k]; the pack has passed validate().
void unpack(const Weight& pack, uint16_t* weight);

}  // namespace fs::sparse_matmul::bitmap16
