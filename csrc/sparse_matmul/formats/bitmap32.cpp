#include "bitmap32.h"

namespace fs::sparse_matmul::formats {
namespace {

// Where each section begins.
struct Layout {
  int64_t blocks, offset, mask, value, end;
  Layout(int64_t n, int64_t k, int64_t total)
      : blocks(ceil_div(n, kBitmapColumns)),
        offset(kPackHeaderBytes),
        mask(offset + round64(8 * (blocks + 1))),
        value(mask + round64(4 * blocks * k)),
        end(value + round64(4 * (total + kSlack))) {}
};

std::vector<uint8_t> pack(const Source& s) {
  const int64_t nonzeros = s.nonzeros();
  const Layout l(s.n, s.k, nonzeros);
  std::vector<uint8_t> out = begin_pack(kBitmap32Format, s, nonzeros, l.end);
  auto* offset = reinterpret_cast<uint64_t*>(out.data() + l.offset);
  auto* mask = reinterpret_cast<uint32_t*>(out.data() + l.mask);
  auto* value = reinterpret_cast<float*>(out.data() + l.value);
  uint64_t used = 0;
  for (int64_t b = 0; b < l.blocks; ++b) {
    offset[b] = used;
    const int64_t width = std::min(kBitmapColumns, s.n - b * kBitmapColumns);
    for (int64_t k = 0; k < s.k; ++k)
      for (int64_t j = 0; j < width; ++j) {
        const float w = s.at(b * kBitmapColumns + j, k);
        if (w == 0.0f) continue;
        mask[b * s.k + k] |= uint32_t{1} << j;
        value[used++] = w;
      }
  }
  offset[l.blocks] = used;
  return out;
}

std::string view(const PackHeader& h, const uint8_t* bytes, int64_t size, Pack* out) {
  const Layout l(h.n, h.k, h.nonzeros);
  const std::string error = size_error(h, size, l.end);
  if (!error.empty()) return error;
  *out = {};
  out->format = kBitmap32;
  out->n = h.n;
  out->k = h.k;
  out->total = h.nonzeros;
  out->offset = reinterpret_cast<const uint64_t*>(bytes + l.offset);
  out->mask = reinterpret_cast<const uint32_t*>(bytes + l.mask);
  out->value = reinterpret_cast<const float*>(bytes + l.value);
  return "";
}

std::string damage(const PackHeader&, const Pack& p, const uint8_t* bytes) {
  const Layout l(p.n, p.k, p.total);
  const std::string error = offsets_damage(p.offset, l.blocks, p.total);
  if (!error.empty()) return error;
  for (int64_t b = 0; b < l.blocks; ++b) {
    const int64_t width = std::min(kBitmapColumns, p.n - b * kBitmapColumns);
    uint64_t bits = 0;
    for (int64_t k = 0; k < p.k; ++k) {
      const uint32_t m = p.mask[b * p.k + k];
      if (width < 32 && (m >> width) != 0) return damaged("a mask with bits beyond N");
      bits += static_cast<uint64_t>(__builtin_popcount(m));
    }
    if (bits != p.offset[b + 1] - p.offset[b]) return damaged("masks that do not match the offsets");
  }
  if (!all_zero(bytes + l.offset + 8 * (l.blocks + 1), bytes + l.mask) ||
      !all_zero(bytes + l.mask + 4 * l.blocks * p.k, bytes + l.value))
    return damaged(kGap);
  return values_damage(p.value, p.total, bytes + l.end);
}

void unpack(const Pack& p, float* weight) {
  const float* value = p.value;
  for (int64_t b = 0; b < ceil_div(p.n, kBitmapColumns); ++b)
    for (int64_t k = 0; k < p.k; ++k)
      for (uint32_t m = p.mask[b * p.k + k]; m != 0; m &= m - 1)
        weight[(b * kBitmapColumns + __builtin_ctz(m)) * p.k + k] = *value++;
}

}  // namespace

const PackedFormat kBitmap32Format{kBitmap32, "bitmap32", kBitmapColumns, kLargestSide, &pack, &view, &damage, &unpack};

}  // namespace fs::sparse_matmul::formats
