// u4 v1, the packed layout of a 4-bit weight [N,K] with one scale (and zero point) per column n and group of G
// consecutive k, G = 32, 64 or 128. The weight is (code - zero_point) * scale, code and zero_point in [0, 15].
//
//   64-byte pack header (runtime/pack.h): dtype 5 = symmetric (zero_point is 8 everywhere, none is stored),
//   6 = affine; block = G; nonzeros counts code != zero_point
//   u8 codes [Np/16][Kp/8][16][4]     Np: N rounded up to 16, Kp: K rounded up to G; S = Kp/G groups
//     code (n,k): byte ((n/16)*(Kp/8) + k/8)*64 + (n%16)*4 + k%4, its low nibble if k%8 < 4, else its high nibble
//     so one little-endian u32 holds 8 consecutive k of one column (low nibbles k..k+3, high nibbles k+4..k+7), 64
//     bytes hold 8 k of 16 columns, 8*G bytes one group of 16 columns
//   f16 scale [Np/16][S][16]          scale (n,g): element ((n/16)*S + g)*16 + n%16; finite, any sign, may be zero
//   zeros up to the next multiple of 64
//   affine alone: u8 zero [Np/16][S][8]
//     zero point (n,g): byte ((n/16)*S + g)*8 + n%8, its low nibble if n%16 < 8, else its high nibble
//     zeros up to the next multiple of 64
//
// Each run begins at a multiple of 64 from the start. Padding: the codes of k >= K are the zero point of their column
// and group (8 if symmetric), so that they are weights of zero; columns n >= N have code, scale and zero point 0.
// 4 + 16/G bits a weight, affine 4 + 20/G. Little-endian, the same on every ISA level and device; readers refuse
// other versions.
#pragma once
#include <cstdint>
#include <string>

#include "../../runtime/pack.h"

namespace fs {

namespace u4 {

inline constexpr uint16_t kFormat = 6;
inline constexpr uint16_t kVersion = 1;
inline constexpr uint32_t kDTypeSymmetric = 5;
inline constexpr uint32_t kDTypeAffine = 6;
inline constexpr int kSymmetricZero = 8;
inline constexpr int64_t kHeaderBytes = kPackHeaderBytes;
inline constexpr int64_t kColumns = 16;  // of one column panel
inline constexpr int64_t kCellK = 8;     // k of one 64-byte cell

inline bool is_group(int64_t group) { return group == 32 || group == 64 || group == 128; }

// Where everything is. Offsets in bytes from the start of the pack.
struct Layout {
  int64_t n, k, group;
  bool affine;
  int64_t padded_n() const { return (n + 15) / 16 * 16; }
  int64_t groups() const { return (k + group - 1) / group; }
  int64_t padded_k() const { return groups() * group; }
  int64_t panels() const { return padded_n() / kColumns; }
  int64_t panel_bytes() const { return padded_k() * 8; }        // of codes: between column panels
  int64_t group_bytes() const { return group * 8; }             // of codes: between the groups of a column panel
  int64_t panel_scales() const { return groups() * kColumns; }  // f16: between column panels
  int64_t panel_zero_bytes() const { return groups() * 8; }     // of zero points: between column panels
  int64_t scale_offset() const { return kHeaderBytes + panels() * panel_bytes(); }
  int64_t zero_offset() const { return scale_offset() + (panels() * panel_scales() * 2 + 63) / 64 * 64; }
  int64_t bytes() const { return zero_offset() + (affine ? (panels() * panel_zero_bytes() + 63) / 64 * 64 : 0); }
};

inline const uint8_t* codes(const uint8_t* pack) { return pack + kHeaderBytes; }
inline const uint16_t* scales(const uint8_t* pack, const Layout& l) {
  return reinterpret_cast<const uint16_t*>(pack + l.scale_offset());
}
inline const uint8_t* zeros(const uint8_t* pack, const Layout& l) {
  return l.affine ? pack + l.zero_offset() : nullptr;
}

// Code (n, k) of the source at n * stride_n + k * stride_k: s8 in [-8, 7] (8 less than the code) for a symmetric
// layout, u8 in [0, 15] for an affine one. scale f16 bits [n, groups], zero [n, groups] in [0, 15] or null if
// symmetric, both contiguous. `pack` has l.bytes(); all of it is written.
void pack(const Layout& l, const uint8_t* codes, int64_t stride_n, int64_t stride_k, const uint16_t* scale,
          const uint8_t* zero, uint8_t* pack);

// The inverse: codes [n, k] as the source had them, scale [n, groups], zero [n, groups] (left alone if symmetric).
void unpack(const Layout& l, const uint8_t* pack, uint8_t* codes, uint16_t* scale, uint8_t* zero);

// The weight itself in float32, [n, k]: (code - zero point) * scale, one rounding.
void dequantize(const Layout& l, const uint8_t* pack, float* weight);

// The header of such a pack.
void write_header(const Layout& l, int64_t nonzeros, uint8_t* pack);

// What the header says, for callers that must learn n, k, group and kind from it. Reads the header alone. Empty if
// `pack` (of `bytes` bytes) begins like a u4 v1 pack whose sizes agree; else what is wrong, for "... must be a u4
// pack: ". Only after "" is *l set. fields_error(): the same but for the size, of a format with the same fields.
std::string fields_error(const uint8_t* pack, int64_t bytes, uint16_t format, const char* name, uint16_t version,
                         Layout* l);
std::string header_error(const uint8_t* pack, int64_t bytes, Layout* l);

// Beyond the header: every scale finite, padding as stated above, the count of non-zeros. Empty if all is well.
std::string content_error(const Layout& l, const uint8_t* pack);

}  // namespace u4
}  // namespace fs
