#include "bitmap16.h"

#include <cstring>

#include "bitmap.inl"
#include "sparse.h"

namespace fs::sparse_matmul::bitmap16 {
namespace {

using formats::BitmapLayout;

constexpr uint32_t kF16 = 3, kBf16 = 4;  // dtypes of the header

bool is_zero(uint16_t bits) { return (bits & 0x7fff) == 0; }

}  // namespace

std::vector<uint8_t> pack(const uint16_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k,
                          DType dtype) {
  const auto at = [&](int64_t row, int64_t column) { return weight[row * stride_n + column * stride_k]; };
  int64_t nonzeros = 0;
  for (int64_t row = 0; row < n; ++row)
    for (int64_t column = 0; column < k; ++column) nonzeros += !is_zero(at(row, column));
  const BitmapLayout l(n, k, nonzeros, 2);
  std::vector<uint8_t> out(static_cast<size_t>(l.end));
  formats::fill_bitmap<uint16_t>(out.data(), l, n, k, at, is_zero);
  PackHeader header{};
  std::memcpy(header.magic, "fspk", 4);
  header.format = kFormat;
  header.version = formats::kVersion;
  header.dtype = dtype == DType::f16 ? kF16 : kBf16;
  header.block = kBitmapColumns;
  header.n = n;
  header.k = k;
  header.nonzeros = nonzeros;
  header.bytes = out.size();
  std::memcpy(out.data(), &header, sizeof header);
  return out;
}

std::string view(const PackHeader& h, const uint8_t* bytes, int64_t size, Weight* out) {
  const auto text = [](auto number) { return std::to_string(number); };
  if (std::memcmp(h.magic, "fspk", 4) != 0)
    return "got bytes that do not begin with \"fspk\"; make one with ops.pack()";
  if (h.format != kFormat) return "got format " + text(h.format) + ", expected 2 (bitmap32)";
  if (h.version != formats::kVersion) return "got bitmap32 version " + text(h.version) + ", this build reads version 1";
  if ((h.dtype != kF16 && h.dtype != kBf16) || h.block != kBitmapColumns)
    return "got dtype code " + text(h.dtype) + " and block " + text(h.block) + ", expected 3 or 4 and 32";
  const bool sides = h.n >= 0 && h.k >= 0 && h.n < kLargestSide && h.k < kLargestSide;
  if (!sides || h.nonzeros < 0 || h.nonzeros > h.n * h.k || h.nonzeros > size)
    return "got a damaged header: N=" + text(h.n) + ", K=" + text(h.k) + ", " + text(h.nonzeros) + " non-zeros";
  if (!formats::all_zero(h.zero, h.zero + sizeof h.zero))
    return "got a damaged header: reserved bytes that are not zero";
  const BitmapLayout l(h.n, h.k, h.nonzeros, 2);
  const std::string error = formats::size_error(h, size, l.end);
  if (!error.empty()) return error;
  *out = {h.n,
          h.k,
          h.dtype == kF16 ? DType::f16 : DType::bf16,
          h.nonzeros,
          reinterpret_cast<const uint64_t*>(bytes + l.offset),
          reinterpret_cast<const uint32_t*>(bytes + l.mask),
          reinterpret_cast<const uint16_t*>(bytes + l.value)};
  return "";
}

std::string validate(const uint8_t* bytes, int64_t size, Weight* out) {
  if (size < kPackHeaderBytes) return "got " + std::to_string(size) + " bytes, a header alone has 64";
  PackHeader header;
  std::memcpy(&header, bytes, sizeof header);
  std::string error = view(header, bytes, size, out);
  if (!error.empty()) return error;
  const BitmapLayout l(out->n, out->k, out->total, 2);
  error = formats::bitmap_damage(bytes, l, out->n, out->k, out->total);
  if (!error.empty()) return error;
  const uint16_t* end = out->value + out->total;
  if (std::any_of(out->value, end, is_zero)) return formats::damaged("a stored zero");
  return formats::all_zero(reinterpret_cast<const uint8_t*>(end), bytes + l.end) ? "" : formats::damaged(formats::kGap);
}

void unpack(const Weight& p, uint16_t* weight) {
  if (p.n == 0 || p.k == 0) return;  // an empty tensor has no memory
  std::memset(weight, 0, static_cast<size_t>(p.n * p.k) * 2);
  formats::unpack_bitmap(p.mask, p.value, p.n, p.k, weight);
}

}  // namespace fs::sparse_matmul::bitmap16
