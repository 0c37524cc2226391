// The packs of a sparse weight [N,K] that run on the CPU, float32 or (sell8, panels128; bitmap32: bitmap16.h) bfloat16:
// one face for all layouts. Each layout is documented to the byte in its own header (formats/<format>.h); all begin
// with the 64-byte header of runtime/pack.h, dtype 2 or 4.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../../runtime/pack.h"
#include "../sparse_matmul.h"

namespace fs::sparse_matmul::formats {

struct PackedFormat;

inline constexpr uint16_t kVersion = 1;
inline constexpr uint32_t kDTypeF32 = 2, kDTypeBf16 = 4;

// The layout with this code, header block (0: the first with the code) and dtype, or null; and those of float32 as "2
// (bitmap32), 3 (sell16) or ...", for messages.
const PackedFormat* find(int64_t code, int64_t block = 0, uint32_t dtype = kDTypeF32);
std::string known();

// The pack of f32[n, k], element (n, k) at n * stride_n + k * stride_k, k at most what the layout allows.
std::vector<uint8_t> pack(const PackedFormat& format, const float* weight, int64_t stride_n, int64_t stride_k,
                          int64_t n, int64_t k);

// Takes a pack apart. Empty if header and size are right; else what is wrong, for "... must be a pack: ". Reads the
// header, and offset's last element: what it costs is in docs/kernels/sparse_matmul.md. Of a pair (formats/pair.h) the
// pack that serves `rows` rows of x.
std::string view(const uint8_t* bytes, int64_t size, Pack* out, int64_t rows = 1);

// The header of a pack of `size` bytes as somebody describes it who does not read it: kind = format | dtype << 16 |
// block << 32. Of a bitmap's values it says as many as there is room for: the masks alone tell how many there are.
PackHeader described(int64_t kind, int64_t n, int64_t k, int64_t size);

// The same for a bitmap32 pack in the memory of a GPU, whose header was copied to the host; `bytes` is not read.
std::string view_bitmap32(const PackHeader& header, const uint8_t* bytes, int64_t size, Pack* out);

// As view(), then every index, count, offset, mask and gap: empty only for what pack() writes, apart from the values.
std::string validate(const uint8_t* bytes, int64_t size);

// The inverse of pack(), into a contiguous f32[n, k], bfloat16 widened; the pack has passed validate().
void unpack(const Pack& pack, float* weight);

}  // namespace fs::sparse_matmul::formats
