#include "bitmap32.h"

#include "bitmap.inl"

namespace fs::sparse_matmul::formats {
namespace {

std::vector<uint8_t> pack(const Source& s) {
  const int64_t nonzeros = s.nonzeros();
  const BitmapLayout l(s.n, s.k, nonzeros, sizeof(float));
  std::vector<uint8_t> out = begin_pack(kBitmap32Format, s, nonzeros, l.end);
  fill_bitmap<float>(
      out.data(), l, s.n, s.k, [&](int64_t n, int64_t k) { return s.at(n, k); }, [](float w) { return w == 0.0f; });
  return out;
}

std::string view(const PackHeader& h, const uint8_t* bytes, int64_t size, Pack* out) {
  const BitmapLayout l(h.n, h.k, h.nonzeros, sizeof(float));
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
  const BitmapLayout l(p.n, p.k, p.total, sizeof(float));
  const std::string error = bitmap_damage(bytes, l, p.n, p.k, p.total);
  return error.empty() ? values_damage(p.value, p.total, bytes + l.end) : error;
}

void unpack(const Pack& p, float* weight) { unpack_bitmap(p.mask, p.value, p.n, p.k, weight); }

}  // namespace

int64_t bitmap_room(int64_t n, int64_t k, int64_t value_bytes, int64_t size) {
  const int64_t bytes = size - BitmapLayout(n, k, 0, value_bytes).value;
  return bytes < 0 ? -1 : bytes / value_bytes - kSlack;
}

const PackedFormat kBitmap32Format{kBitmap32, "bitmap32", kBitmapColumns, kLargestSide, &pack, &view, &damage, &unpack};

}  // namespace fs::sparse_matmul::formats
