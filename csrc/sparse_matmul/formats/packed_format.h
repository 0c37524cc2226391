// What a packed layout of a float32 weight (sell8: or a bfloat16 one) brings (formats/<format>.cpp), and what these
// files share. formats/sparse.h is the face for everybody else.
//
// Every section of a pack begins at a multiple of 64 from its start, the gaps are zero. Little-endian, the same on
// every ISA level. A value is stored if its bits are not those of +0 or -0 (so a NaN or an infinity is stored).
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "../../runtime/pack.h"
#include "../sparse_matmul.h"

namespace fs::sparse_matmul::formats {

// The matrix to be packed; what is not zero is stored.
struct Source {
  const float* data;
  int64_t stride_n, stride_k, n, k;
  float at(int64_t row, int64_t column) const { return data[row * stride_n + column * stride_k]; }
  // The non-zeros of a row in [begin, end); 0 for rows beyond N.
  int64_t count(int64_t row, int64_t begin, int64_t end) const {
    int64_t found = 0;
    if (row < n)
      for (int64_t i = begin; i < end; ++i) found += at(row, i) != 0.0f;
    return found;
  }
  int64_t nonzeros() const {
    int64_t found = 0;
    for (int64_t row = 0; row < n; ++row) found += count(row, 0, k);
    return found;
  }
};

struct PackedFormat {
  int code;  // PackHeader.format
  const char* name;
  uint32_t block;  // PackHeader.block; layouts of one code differ in it
  int64_t largest_k;

  std::vector<uint8_t> (*pack)(const Source&);

  // Takes a pack apart whose header is sound. Empty if the size is right; else what is wrong.
  std::string (*view)(const PackHeader&, const uint8_t* bytes, int64_t size, Pack* out);

  // Of a pack that view() took: empty if every index, count, offset, mask and gap is what pack() writes.
  std::string (*damage)(const PackHeader&, const Pack&, const uint8_t* bytes);

  // Into a contiguous f32[n, k] of zeros, neither of them 0; the pack is not damaged (or any that view() took, where
  // damage() is differs_from_its_repack).
  void (*unpack)(const Pack&, float* weight);

  uint32_t dtype = 2;  // PackHeader.dtype: float32, or 4, bfloat16, which pack() gets widened
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round64(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// `bytes` zeros behind a header.
std::vector<uint8_t> begin_pack(const PackedFormat& format, const Source& source, int64_t nonzeros, int64_t bytes);

// Empty if `size` and the header's size are what they must be.
std::string size_error(const PackHeader& header, int64_t size, int64_t expected);

// Rows 0 .. count.size() - 1 by descending count, ties ascending.
std::vector<uint32_t> descending(const std::vector<int64_t>& count);

inline std::string damaged(const char* what) { return std::string("got a damaged pack: ") + what; }
inline constexpr const char* kGap = "a gap that is not zero";

inline bool all_zero(const uint8_t* begin, const uint8_t* end) {
  return std::all_of(begin, end, [](uint8_t byte) { return byte == 0; });
}

// The first of `groups` + 1 offsets is 0, the last `total`, and they ascend; empty if so.
std::string offsets_damage(const uint64_t* offset, int64_t groups, int64_t total);

// A damage() for layouts with one way to pack a weight: unpacks and packs again, and so sees every byte.
std::string differs_from_its_repack(const PackHeader& header, const Pack& pack, const uint8_t* bytes);

// `total` values, all of them not zero, and zeros from there to the end of the pack; empty if so.
std::string values_damage(const float* value, int64_t total, const uint8_t* end);

}  // namespace fs::sparse_matmul::formats
