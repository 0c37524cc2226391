// What bitmaps of float32 and of 16-bit values have in common (bitmap32.h, bitmap16.h): T is the type of a value.
#pragma once
#include "packed_format.h"

namespace fs::sparse_matmul::formats {
namespace {

// Where each section begins.
struct BitmapLayout {
  int64_t blocks, offset, mask, value, end;
  BitmapLayout(int64_t n, int64_t k, int64_t total, int64_t value_bytes)
      : blocks(ceil_div(n, kBitmapColumns)),
        offset(kPackHeaderBytes),
        mask(offset + round64(8 * (blocks + 1))),
        value(mask + round64(4 * blocks * k)),
        end(value + round64(value_bytes * (total + kSlack))) {}
};

// `at(row, k)`: a weight; is_zero: whether it is left out.
template <class T, class At, class IsZero>
void fill_bitmap(uint8_t* out, const BitmapLayout& l, int64_t n, int64_t k_size, At at, IsZero is_zero) {
  auto* offset = reinterpret_cast<uint64_t*>(out + l.offset);
  auto* mask = reinterpret_cast<uint32_t*>(out + l.mask);
  auto* value = reinterpret_cast<T*>(out + l.value);
  uint64_t used = 0;
  for (int64_t b = 0; b < l.blocks; ++b) {
    offset[b] = used;
    const int64_t width = std::min(kBitmapColumns, n - b * kBitmapColumns);
    for (int64_t k = 0; k < k_size; ++k)
      for (int64_t j = 0; j < width; ++j) {
        const T w = at(b * kBitmapColumns + j, k);
        if (is_zero(w)) continue;
        mask[b * k_size + k] |= uint32_t{1} << j;
        value[used++] = w;
      }
  }
  offset[l.blocks] = used;
}

// Of offsets, masks and the gaps behind them; empty if they are sound.
inline std::string bitmap_damage(const uint8_t* bytes, const BitmapLayout& l, int64_t n, int64_t k_size,
                                 int64_t total) {
  const auto* offset = reinterpret_cast<const uint64_t*>(bytes + l.offset);
  const auto* mask = reinterpret_cast<const uint32_t*>(bytes + l.mask);
  const std::string error = offsets_damage(offset, l.blocks, total);
  if (!error.empty()) return error;
  for (int64_t b = 0; b < l.blocks; ++b) {
    const int64_t width = std::min(kBitmapColumns, n - b * kBitmapColumns);
    uint64_t bits = 0;
    for (int64_t k = 0; k < k_size; ++k) {
      const uint32_t m = mask[b * k_size + k];
      if (width < 32 && (m >> width) != 0) return damaged("a mask with bits beyond N");
      bits += static_cast<uint64_t>(__builtin_popcount(m));
    }
    if (bits != offset[b + 1] - offset[b]) return damaged("masks that do not match the offsets");
  }
  if (!all_zero(bytes + l.offset + 8 * (l.blocks + 1), bytes + l.mask) ||
      !all_zero(bytes + l.mask + 4 * l.blocks * k_size, bytes + l.value))
    return damaged(kGap);
  return "";
}

// Into a contiguous [n, k] of zeros.
template <class T>
void unpack_bitmap(const uint32_t* mask, const T* value, int64_t n, int64_t k_size, T* weight) {
  for (int64_t b = 0; b < ceil_div(n, kBitmapColumns); ++b)
    for (int64_t k = 0; k < k_size; ++k)
      for (uint32_t m = mask[b * k_size + k]; m != 0; m &= m - 1)
        weight[(b * kBitmapColumns + __builtin_ctz(m)) * k_size + k] = *value++;
}

}  // namespace
}  // namespace fs::sparse_matmul::formats
