#include "bitmap_u4.h"

#include <algorithm>
#include <cstring>

namespace fs::bitmap_u4 {
namespace {

using int8_gemm::BitmapU4;

constexpr int64_t kCellBytes = 64;

int64_t round_to_64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Where the sections begin.
struct Sections {
  int64_t offset, mask, scale, code;
  explicit Sections(const u4::Layout& l) {
    const int64_t cells = l.padded_k() / u4::kCellK;
    offset = kPackHeaderBytes;
    mask = offset + round_to_64(8 * (l.panels() + 1));
    scale = mask + l.panels() * cells * 16;  // a group has at least four cells
    code = scale + round_to_64(l.panels() * l.panel_scales() * 2);
  }
};

BitmapU4 parts(const u4::Layout& l, const uint8_t* bytes, int64_t total) {
  const Sections at(l);
  return {l.n,
          l.k,
          l.group,
          total,
          reinterpret_cast<const uint64_t*>(bytes + at.offset),
          reinterpret_cast<const uint64_t*>(bytes + at.mask),
          reinterpret_cast<const uint16_t*>(bytes + at.scale),
          bytes + at.code};
}

int count(uint64_t mask) { return __builtin_popcountll(mask); }

}  // namespace

std::vector<uint8_t> pack(const u4::Layout& l, const uint8_t* u4_pack) {
  const Sections at(l);
  std::vector<uint8_t> out(static_cast<size_t>(at.code));
  const uint8_t* cell = u4::codes(u4_pack);
  uint64_t position = 0;
  for (int64_t panel = 0; panel < l.panels(); ++panel) {
    std::memcpy(out.data() + at.offset + 8 * panel, &position, 8);
    const int64_t live = std::min(u4::kColumns, l.n - panel * u4::kColumns) * 4;  // bytes of a cell: columns below N
    const int64_t cells = l.padded_k() / u4::kCellK;
    for (int64_t c = 0; c < cells; ++c, cell += kCellBytes) {
      uint64_t mask[2] = {};
      uint8_t codes[kCellBytes] = {};
      int stored[2] = {};
      for (int64_t b = 0; b < live; ++b)
        for (int h = 0; h < 2; ++h) {
          const int code = cell[b] >> 4 * h & 15;
          if (code == u4::kSymmetricZero) continue;
          mask[h] |= uint64_t{1} << b;
          codes[stored[h]++] |= static_cast<uint8_t>((code ^ 8) << 4 * h);
        }
      std::memcpy(out.data() + at.mask + (panel * cells + c) * 16, mask, 16);
      const int bytes = std::max(stored[0], stored[1]);
      out.insert(out.end(), codes, codes + bytes);
      position += static_cast<uint64_t>(bytes);
    }
  }
  std::memcpy(out.data() + at.offset + 8 * l.panels(), &position, 8);
  std::memcpy(out.data() + at.scale, u4::scales(u4_pack, l), static_cast<size_t>(l.panels() * l.panel_scales() * 2));
  out.resize(static_cast<size_t>(at.code + round_to_64(static_cast<int64_t>(position)) + kRoom));
  PackHeader header;
  std::memcpy(&header, u4_pack, sizeof header);
  header.format = kFormat;
  header.version = kVersion;
  header.bytes = out.size();
  std::memcpy(out.data(), &header, sizeof header);
  return out;
}

std::string header_error(const uint8_t* pack, int64_t bytes, BitmapU4* out) {
  u4::Layout l{};
  const std::string error = u4::fields_error(pack, bytes, kFormat, "bitmap_u4", kVersion, &l);
  if (!error.empty()) return error;
  PackHeader h;
  std::memcpy(&h, pack, sizeof h);
  if (l.affine) return "got dtype code 6, expected 5 for bitmap_u4, which has no zero points";
  const Sections at(l);
  const int64_t total = bytes - at.code - kRoom, most = l.panels() * l.padded_k() / u4::kCellK * kCellBytes;
  if (h.bytes != static_cast<uint64_t>(bytes) || bytes % 64 != 0 || total < 0 || total > most)
    return "got " + std::to_string(bytes) + " bytes (the header says " + std::to_string(h.bytes) + "), expected " +
           std::to_string(at.code + kRoom) + " and those of the codes, in all a multiple of 64";
  *out = parts(l, pack, total);
  return "";
}

std::string content_error(const uint8_t* bytes, int64_t size) {
  BitmapU4 w{};
  std::string error = header_error(bytes, size, &w);
  if (!error.empty()) return error;
  PackHeader h;
  std::memcpy(&h, bytes, sizeof h);
  const u4::Layout l = layout(w);
  const std::vector<uint8_t> dense = unpack(w, h.nonzeros);
  error = u4::content_error(l, dense.data());
  if (!error.empty()) return error;
  // There is one way to pack a weight, so packing again shows every byte that is not as it should be.
  const std::vector<uint8_t> again = pack(l, dense.data());
  if (!std::equal(again.begin(), again.end(), bytes, bytes + size))
    return "got a damaged pack: offsets, masks and codes that do not fit each other or the header";
  return "";
}

u4::Layout layout(const BitmapU4& w) { return {w.n, w.k, w.group, false}; }

std::vector<uint8_t> unpack(const BitmapU4& w, int64_t nonzeros) {
  const u4::Layout l = layout(w);
  std::vector<uint8_t> out(static_cast<size_t>(l.bytes()));
  u4::write_header(l, nonzeros, out.data());
  for (int64_t panel = 0; panel < l.panels(); ++panel) {
    uint8_t* first = out.data() + u4::kHeaderBytes + panel * l.panel_bytes();
    cells(w, panel, first);
    const int64_t live = std::min(u4::kColumns, l.n - panel * u4::kColumns) * 4;
    for (int64_t c = 0; c < w.cells(); ++c) std::fill(first + c * kCellBytes + live, first + (c + 1) * kCellBytes, 0);
  }
  std::memcpy(out.data() + l.scale_offset(), w.scale, static_cast<size_t>(l.panels() * l.panel_scales() * 2));
  return out;
}

void cells(const BitmapU4& w, int64_t panel, uint8_t* out) {
  const uint64_t* mask = w.mask + panel * w.cells() * 2;
  int64_t position = w.begin(panel);
  for (int64_t c = 0; c < w.cells(); ++c, mask += 2, out += kCellBytes) {
    std::memset(out, 0x88, kCellBytes);
    const uint8_t* low = w.code + position;
    for (uint64_t m = mask[0]; m != 0; m &= m - 1)
      out[__builtin_ctzll(m)] = static_cast<uint8_t>(0x80 | ((*low++ & 0x0f) ^ 0x08));
    const uint8_t* high = w.code + position;
    for (uint64_t m = mask[1]; m != 0; m &= m - 1) {
      uint8_t* both = out + __builtin_ctzll(m);
      *both = static_cast<uint8_t>((*both & 0x0f) | ((*high++ & 0xf0) ^ 0x80));
    }
    position = std::min<int64_t>(position + std::max(count(mask[0]), count(mask[1])), w.total);
  }
}

}  // namespace fs::bitmap_u4
