#include "u4.h"

#include <cstring>

namespace fs::u4 {

namespace {

uint8_t read_code(const Layout& l, const uint8_t* codes, int64_t n, int64_t k) {
  const uint8_t byte = codes[(n / 16 * (l.padded_k() / 8) + k / 8) * 64 + n % 16 * 4 + k % 4];
  return k % 8 < 4 ? byte & 15 : byte >> 4;
}

uint8_t read_zero(const Layout& l, const uint8_t* zeros, int64_t n, int64_t g) {
  if (zeros == nullptr) return kSymmetricZero;
  const uint8_t byte = zeros[(n / 16 * l.groups() + g) * 8 + n % 8];
  return n % 16 < 8 ? byte & 15 : byte >> 4;
}

float f16_value(const uint16_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  const uint32_t sign = (uint32_t{bits} & 0x8000) << 16, rest = (uint32_t{bits} & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &rest, 4);
  value *= 0x1p112f;  // the exponent rebiased by a multiplication, which makes subnormals normal too
  uint32_t out;
  std::memcpy(&out, &value, 4);
  out |= sign;
  std::memcpy(&value, &out, 4);
  return value;
}

std::string shape(int64_t n, int64_t k) { return "[N=" + std::to_string(n) + ", K=" + std::to_string(k) + "]"; }

}  // namespace

void pack(const Layout& l, const uint8_t* codes, int64_t stride_n, int64_t stride_k, const uint16_t* scale,
          const uint8_t* zero, uint8_t* pack) {
  std::memset(pack, 0, static_cast<size_t>(l.bytes()));
  const int64_t groups = l.groups();
  int64_t nonzeros = 0;
  for (int64_t n = 0; n < l.n; ++n) {
    const uint8_t* source = codes + n * stride_n;
    uint8_t* column = pack + kHeaderBytes + n / 16 * l.panel_bytes() + n % 16 * 4;
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t point = l.affine ? zero[n * groups + g] : kSymmetricZero;
      for (int64_t k0 = g * l.group; k0 < (g + 1) * l.group; k0 += kCellK) {
        uint8_t code[kCellK];
        for (int64_t i = 0; i < kCellK; ++i) {
          const uint8_t value = k0 + i < l.k ? source[(k0 + i) * stride_k] : 0;
          code[i] = k0 + i < l.k ? static_cast<uint8_t>(l.affine ? value : value + kSymmetricZero) : point;
          nonzeros += code[i] != point;
        }
        uint8_t* cell = column + k0 / kCellK * 64;
        for (int i = 0; i < 4; ++i) cell[i] = static_cast<uint8_t>((code[i] & 15) | code[4 + i] << 4);
      }
      const int64_t slot = n / 16 * groups + g;
      std::memcpy(pack + l.scale_offset() + (slot * 16 + n % 16) * 2, scale + n * groups + g, 2);
      if (l.affine) pack[l.zero_offset() + slot * 8 + n % 8] |= static_cast<uint8_t>(n % 16 < 8 ? point : point << 4);
    }
  }
  write_header(l, nonzeros, pack);
}

void write_header(const Layout& l, int64_t nonzeros, uint8_t* pack) {
  PackHeader header{};
  std::memcpy(header.magic, "fspk", 4);
  header.format = kFormat;
  header.version = kVersion;
  header.dtype = l.affine ? kDTypeAffine : kDTypeSymmetric;
  header.block = static_cast<uint32_t>(l.group);
  header.n = l.n;
  header.k = l.k;
  header.nonzeros = nonzeros;
  header.bytes = static_cast<uint64_t>(l.bytes());
  std::memcpy(pack, &header, sizeof header);
}

void unpack(const Layout& l, const uint8_t* pack, uint8_t* out, uint16_t* scale, uint8_t* zero) {
  const int64_t groups = l.groups();
  const uint8_t* points = zeros(pack, l);
  for (int64_t n = 0; n < l.n; ++n) {
    for (int64_t k = 0; k < l.k; ++k)
      out[n * l.k + k] = static_cast<uint8_t>(read_code(l, codes(pack), n, k) - (l.affine ? 0 : kSymmetricZero));
    for (int64_t g = 0; g < groups; ++g) {
      std::memcpy(scale + n * groups + g, scales(pack, l) + (n / 16 * groups + g) * 16 + n % 16, 2);
      if (l.affine) zero[n * groups + g] = read_zero(l, points, n, g);
    }
  }
}

void dequantize(const Layout& l, const uint8_t* pack, float* weight) {
  const uint8_t* points = zeros(pack, l);
  for (int64_t n = 0; n < l.n; ++n) {
    for (int64_t g = 0; g < l.groups(); ++g) {
      const float scale = f16_value(scales(pack, l) + (n / 16 * l.groups() + g) * 16 + n % 16);
      const int point = read_zero(l, points, n, g);
      for (int64_t k = g * l.group; k < (g + 1) * l.group && k < l.k; ++k)
        weight[n * l.k + k] = static_cast<float>(read_code(l, codes(pack), n, k) - point) * scale;
    }
  }
}

std::string fields_error(const uint8_t* pack, int64_t bytes, uint16_t format, const char* name, uint16_t version,
                         Layout* l) {
  if (bytes < kHeaderBytes) return "got " + std::to_string(bytes) + " bytes, a header alone has 64";
  PackHeader h;
  std::memcpy(&h, pack, sizeof h);
  if (std::memcmp(h.magic, "fspk", 4) != 0)
    return "got bytes that do not begin with \"fspk\"; make one with ops.pack()";
  if (h.format != format)
    return "got format " + std::to_string(h.format) + ", expected " + std::to_string(format) + " (" + name + ")";
  if (h.version != version)
    return "got " + std::string(name) + " version " + std::to_string(h.version) + ", this build reads version " +
           std::to_string(version);
  if ((h.dtype != kDTypeSymmetric && h.dtype != kDTypeAffine) || !is_group(h.block))
    return "got dtype code " + std::to_string(h.dtype) + " and groups of " + std::to_string(h.block) +
           ", expected 5 or 6 and 32, 64 or 128";
  if (h.n < 0 || h.k < 0 || h.n >= kLargestSide || h.k >= kLargestSide)
    return "got a damaged header: a pack of " + shape(h.n, h.k);
  if (h.nonzeros < 0 || h.nonzeros > h.n * h.k)
    return "got a damaged header: " + std::to_string(h.nonzeros) + " non-zeros";
  for (uint8_t byte : h.zero)
    if (byte != 0) return "got a damaged header: reserved bytes that are not zero";
  *l = {h.n, h.k, h.block, h.dtype == kDTypeAffine};
  return "";
}

std::string header_error(const uint8_t* pack, int64_t bytes, Layout* l) {
  Layout layout{};
  std::string error = fields_error(pack, bytes, kFormat, "u4", kVersion, &layout);
  if (!error.empty()) return error;
  PackHeader h;
  std::memcpy(&h, pack, sizeof h);
  if (bytes != layout.bytes() || h.bytes != static_cast<uint64_t>(bytes))
    return "got " + std::to_string(bytes) + " bytes (the header says " + std::to_string(h.bytes) + "), expected " +
           std::to_string(layout.bytes()) + " for " + shape(h.n, h.k);
  *l = layout;
  return "";
}

std::string content_error(const Layout& l, const uint8_t* pack) {
  const int64_t groups = l.groups(), all = l.padded_n() * groups;
  const uint16_t* scale = scales(pack, l);
  const uint8_t* points = zeros(pack, l);
  for (int64_t i = 0; i < all; ++i) {
    uint16_t bits;
    std::memcpy(&bits, scale + i, 2);
    if ((bits & 0x7c00) == 0x7c00) return "got a scale that is a NaN or an infinity";
  }
  int64_t nonzeros = 0;
  for (int64_t n = 0; n < l.padded_n(); ++n) {
    for (int64_t g = 0; g < groups; ++g) {
      uint16_t bits;
      std::memcpy(&bits, scale + (n / 16 * groups + g) * 16 + n % 16, 2);
      const uint8_t point = read_zero(l, points, n, g);
      if (n >= l.n && (bits != 0 || (l.affine && point != 0))) return "got padding columns that are not zero";
      for (int64_t k = g * l.group; k < (g + 1) * l.group; ++k) {
        const uint8_t code = read_code(l, codes(pack), n, k);
        if (n >= l.n ? code != 0 : k >= l.k && code != point) return "got padding that is not zero";
        nonzeros += n < l.n && code != point;
      }
    }
  }
  const auto padded_to = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (pack[i] != 0) return false;
    return true;
  };
  const int64_t scales_end = l.scale_offset() + all * 2, zeros_end = l.zero_offset() + (l.affine ? all / 2 : 0);
  if (!padded_to(scales_end, l.zero_offset()) || !padded_to(zeros_end, l.bytes()))
    return "got padding that is not zero";
  PackHeader h;
  std::memcpy(&h, pack, sizeof h);
  if (h.nonzeros != nonzeros)
    return "got " + std::to_string(nonzeros) + " non-zeros where its header says " + std::to_string(h.nonzeros);
  return "";
}

}  // namespace fs::u4
