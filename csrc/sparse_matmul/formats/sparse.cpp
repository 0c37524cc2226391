#include "sparse.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "nm24.h"

namespace fs::sparse_matmul::formats {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round64(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

uint32_t block_of(int format) { return format == kBitmap32 ? 32 : format == kSell16 ? 16 : 128; }
const char* name_of(int format) {
  return format == kBitmap32 ? "bitmap32" : format == kSell16 ? "sell16" : "panels128";
}

// Where each section begins; `total` as in Pack.
struct Layout {
  int64_t groups;  // blocks, slices or chunks
  int64_t offset, middle, index, value, end;
};

Layout layout(int format, int64_t n, int64_t k, int64_t total) {
  Layout l{};
  const int64_t width = format == kBitmap32 ? kBitmapColumns : format == kSell16 ? kSellRows : kChunk;
  l.groups = ceil_div(n, width);
  l.offset = kPackHeaderBytes;
  l.middle = l.offset + round64(8 * (l.groups + 1));
  switch (format) {
    case kBitmap32:
      l.value = l.middle + round64(4 * l.groups * k);
      l.end = l.value + round64(4 * (total + kSlack));
      break;
    case kSell16:
      l.value = l.middle + round64(4 * l.groups * kSellRows);
      l.end = l.value + round64(kSellStepBytes * total);
      break;
    default:
      l.index = l.middle + round64(2 * kChunk * l.groups * ceil_div(k, kBlockK));
      l.value = l.index + round64(total + kSlack);
      l.end = l.value + round64(4 * (total + kSlack));
  }
  return l;
}

Pack pointers(const uint8_t* bytes, int format, int64_t n, int64_t k, int64_t total) {
  const Layout l = layout(format, n, k, total);
  Pack p{};
  p.format = format;
  p.n = n;
  p.k = k;
  p.total = total;
  p.offset = reinterpret_cast<const uint64_t*>(bytes + l.offset);
  p.mask = reinterpret_cast<const uint32_t*>(bytes + l.middle);
  p.row = p.mask;
  p.order = bytes + l.middle;
  p.step = bytes + l.value;
  p.index = bytes + l.index;
  p.value = reinterpret_cast<const float*>(bytes + l.value);
  return p;
}

// Rows 0 .. count.size() - 1 by descending count, ties ascending.
std::vector<uint32_t> descending(const std::vector<int64_t>& count) {
  std::vector<uint32_t> order(count.size());
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return count[a] > count[b]; });
  return order;
}

// The source matrix; what is not zero is stored.
struct Source {
  const float* data;
  int64_t stride_n, stride_k, n, k;
  float at(int64_t row, int64_t column) const { return data[row * stride_n + column * stride_k]; }
  int64_t count(int64_t row, int64_t begin, int64_t end) const {
    int64_t found = 0;
    if (row < n)
      for (int64_t i = begin; i < end; ++i) found += at(row, i) != 0.0f;
    return found;
  }
};

void fill_bitmap(const Source& s, uint8_t* out, const Layout& l) {
  auto* offset = reinterpret_cast<uint64_t*>(out + l.offset);
  auto* mask = reinterpret_cast<uint32_t*>(out + l.middle);
  auto* value = reinterpret_cast<float*>(out + l.value);
  uint64_t used = 0;
  for (int64_t b = 0; b < l.groups; ++b) {
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
  offset[l.groups] = used;
}

void fill_sell(const Source& s, uint8_t* out, const Layout& l, const std::vector<uint32_t>& order,
               const std::vector<int64_t>& count) {
  auto* offset = reinterpret_cast<uint64_t*>(out + l.offset);
  auto* row = reinterpret_cast<uint32_t*>(out + l.middle);
  uint64_t used = 0;
  for (int64_t slice = 0; slice < l.groups; ++slice) {
    offset[slice] = used;
    for (int64_t lane = 0; lane < kSellRows; ++lane) {
      const int64_t place = slice * kSellRows + lane;
      row[place] = place < s.n ? order[static_cast<size_t>(place)] : UINT32_MAX;
      if (place >= s.n) continue;
      uint8_t* step = out + l.value + static_cast<int64_t>(used) * kSellStepBytes;
      for (int64_t k = 0; k < s.k; ++k) {
        const float w = s.at(row[place], k);
        if (w == 0.0f) continue;
        const auto index = static_cast<uint16_t>(k);
        std::memcpy(step + 4 * lane, &w, 4);
        std::memcpy(step + 64 + 2 * lane, &index, 2);
        step += kSellStepBytes;
      }
    }
    used += static_cast<uint64_t>(count[row[slice * kSellRows]]);
  }
  offset[l.groups] = used;
}

void fill_panels(const Source& s, uint8_t* out, const Layout& l) {
  auto* offset = reinterpret_cast<uint64_t*>(out + l.offset);
  auto* value = reinterpret_cast<float*>(out + l.value);
  uint8_t *order = out + l.middle, *index = out + l.index;
  uint64_t used = 0;
  std::vector<int64_t> count(kChunk);
  for (int64_t chunk = 0; chunk < l.groups; ++chunk) {
    offset[chunk] = used;
    for (int64_t k = 0; k < s.k; k += kBlockK, order += 2 * kChunk) {
      const int64_t end = std::min(k + kBlockK, s.k);
      for (int64_t r = 0; r < kChunk; ++r) count[static_cast<size_t>(r)] = s.count(chunk * kChunk + r, k, end);
      const std::vector<uint32_t> sorted = descending(count);
      for (int64_t place = 0; place < kChunk; ++place) {
        const uint32_t r = sorted[static_cast<size_t>(place)];
        order[place] = static_cast<uint8_t>(r);
        order[kChunk + place] = static_cast<uint8_t>(count[r]);
        if (count[r] == 0) continue;
        for (int64_t i = k; i < end; ++i) {
          const float w = s.at(chunk * kChunk + r, i);
          if (w == 0.0f) continue;
          index[used] = static_cast<uint8_t>(i - k);
          value[used++] = w;
        }
      }
    }
  }
  offset[l.groups] = used;
}

}  // namespace

std::vector<uint8_t> pack(Format format, const float* weight, int64_t stride_n, int64_t stride_k, int64_t n,
                          int64_t k) {
  const Source s{weight, stride_n, stride_k, n, k};
  std::vector<int64_t> count(static_cast<size_t>(n));
  for (int64_t r = 0; r < n; ++r) count[static_cast<size_t>(r)] = s.count(r, 0, k);
  const int64_t nonzeros = std::accumulate(count.begin(), count.end(), int64_t{0});
  int64_t total = nonzeros;
  std::vector<uint32_t> order;
  if (format == kSell16) {
    order = descending(count);
    total = 0;
    for (int64_t r = 0; r < n; r += kSellRows) total += count[order[static_cast<size_t>(r)]];
  }
  const Layout l = layout(format, n, k, total);
  std::vector<uint8_t> out(static_cast<size_t>(l.end));
  PackHeader header{};
  std::memcpy(header.magic, "fspk", 4);
  header.format = static_cast<uint16_t>(format);
  header.version = kVersion;
  header.dtype = kDTypeF32;
  header.block = block_of(format);
  header.n = n;
  header.k = k;
  header.nonzeros = nonzeros;
  header.bytes = static_cast<uint64_t>(l.end);
  std::memcpy(out.data(), &header, sizeof header);
  switch (format) {
    case kBitmap32: fill_bitmap(s, out.data(), l); break;
    case kSell16: fill_sell(s, out.data(), l, order, count); break;
    case kPanels128: fill_panels(s, out.data(), l); break;
  }
  return out;
}

namespace {

std::string header_error(const PackHeader& h, int64_t size) {
  const auto text = [](auto value) { return std::to_string(value); };
  if (std::memcmp(h.magic, "fspk", 4) != 0)
    return "got bytes that do not begin with \"fspk\"; make one with ops.pack()";
  if (h.format == nm24::kFormat) return "got nm24, which runs on CUDA only";
  if (h.format != kBitmap32 && h.format != kSell16 && h.format != kPanels128)
    return "got format " + text(h.format) + ", expected 2 (bitmap32), 3 (sell16) or 4 (panels128)";
  if (h.version != kVersion)
    return std::string("got ") + name_of(h.format) + " version " + text(h.version) + ", this build reads version 1";
  if (h.dtype != kDTypeF32 || h.block != block_of(h.format))
    return "got dtype code " + text(h.dtype) + " and block " + text(h.block) + ", expected 2 and " +
           text(block_of(h.format));
  const bool sides = h.n >= 0 && h.k >= 0 && h.n < kLargestSide && h.k < kLargestSide;
  if (!sides || (h.format == kSell16 && h.k > kMaxSellK))
    return "got a damaged header: N=" + text(h.n) + ", K=" + text(h.k);
  if (h.nonzeros < 0 || h.nonzeros > h.n * h.k || h.nonzeros > size)
    return "got a damaged header: " + text(h.nonzeros) + " non-zeros";
  for (uint8_t byte : h.zero)
    if (byte != 0) return "got a damaged header: reserved bytes that are not zero";
  return "";
}

// The pack with `total` values or steps, if its size is that.
std::string sections(const PackHeader& h, const uint8_t* bytes, int64_t size, int64_t total, Pack* out) {
  const auto text = [](auto value) { return std::to_string(value); };
  const int64_t expected = layout(h.format, h.n, h.k, total).end;
  if (size != expected || h.bytes != static_cast<uint64_t>(expected))
    return "got " + text(size) + " bytes (the header says " + text(h.bytes) + "), expected " + text(expected);
  *out = pointers(bytes, h.format, h.n, h.k, total);
  return "";
}

}  // namespace

std::string view(const uint8_t* bytes, int64_t size, Pack* out) {
  const auto text = [](auto value) { return std::to_string(value); };
  if (size < kPackHeaderBytes) return "got " + text(size) + " bytes, a header alone has 64";
  PackHeader h;
  std::memcpy(&h, bytes, sizeof h);
  const std::string error = header_error(h, size);
  if (!error.empty()) return error;
  int64_t total = h.nonzeros;
  if (h.format == kSell16) {  // the number of steps stands behind the last slice
    const Layout l = layout(kSell16, h.n, h.k, 0);
    if (l.end > size) return "got " + text(size) + " bytes, expected at least " + text(l.end);
    uint64_t steps;
    std::memcpy(&steps, bytes + l.offset + 8 * l.groups, 8);
    if (steps > static_cast<uint64_t>(size)) return "got a damaged table: " + text(steps) + " steps";
    total = static_cast<int64_t>(steps);
  }
  return sections(h, bytes, size, total, out);
}

std::string view_bitmap32(const PackHeader& header, const uint8_t* bytes, int64_t size, Pack* out) {
  const std::string error = header_error(header, size);
  if (!error.empty()) return error;
  if (header.format != kBitmap32)
    return std::string("got ") + name_of(header.format) + ", which runs on the CPU only; expected bitmap32 or nm24";
  return sections(header, bytes, size, header.nonzeros, out);
}

std::string validate(const uint8_t* bytes, int64_t size) {
  Pack p;
  const std::string error = view(bytes, size, &p);
  if (!error.empty()) return error;
  const Layout l = layout(p.format, p.n, p.k, p.total);
  PackHeader h;
  std::memcpy(&h, bytes, sizeof h);
  const auto damaged = [](const char* what) { return std::string("got a damaged pack: ") + what; };
  const auto all_zero = [&](int64_t begin, int64_t end) {
    return std::all_of(bytes + begin, bytes + end, [](uint8_t b) { return b == 0; });
  };
  if (p.offset[0] != 0 || p.offset[l.groups] != static_cast<uint64_t>(p.total))
    return damaged("offsets that do not span the values");
  for (int64_t g = 0; g < l.groups; ++g)
    if (p.offset[g] > p.offset[g + 1] || p.offset[g + 1] > static_cast<uint64_t>(p.total))
      return damaged("offsets that do not ascend");
  if (!all_zero(l.offset + 8 * (l.groups + 1), l.middle)) return damaged("a gap that is not zero");
  const auto stored = [](float w) { return w != 0.0f; };

  if (p.format == kBitmap32) {
    for (int64_t b = 0; b < l.groups; ++b) {
      const int64_t width = std::min(kBitmapColumns, p.n - b * kBitmapColumns);
      uint64_t bits = 0;
      for (int64_t k = 0; k < p.k; ++k) {
        const uint32_t m = p.mask[b * p.k + k];
        if (width < 32 && (m >> width) != 0) return damaged("a mask with bits beyond N");
        bits += static_cast<uint64_t>(__builtin_popcount(m));
      }
      if (bits != p.offset[b + 1] - p.offset[b]) return damaged("masks that do not match the offsets");
    }
    if (!all_zero(l.middle + 4 * l.groups * p.k, l.value)) return damaged("a gap that is not zero");
  } else if (p.format == kSell16) {
    std::vector<bool> seen(static_cast<size_t>(p.n));
    int64_t nonzeros = 0, before = p.k, row_before = -1;
    for (int64_t s = 0; s < l.groups; ++s)
      for (int64_t lane = 0; lane < kSellRows; ++lane) {
        const int64_t place = s * kSellRows + lane;
        const uint32_t row = p.row[place];
        if (place >= p.n ? row != UINT32_MAX : row >= p.n || seen[row])
          return damaged("rows that are not a permutation of N");
        if (place < p.n) seen[row] = true;
        int64_t last = -1, count = 0;
        bool ended = false;
        for (uint64_t i = p.offset[s]; i < p.offset[s + 1]; ++i) {
          const uint8_t* step = p.step + static_cast<int64_t>(i) * kSellStepBytes;
          float w;
          uint16_t k;
          std::memcpy(&w, step + 4 * lane, 4);
          std::memcpy(&k, step + 64 + 2 * lane, 2);
          uint32_t w_bits;
          std::memcpy(&w_bits, &w, 4);
          if (!stored(w)) {
            if (k != 0 || w_bits != 0) return damaged("padding that is not zero");
            ended = true;
            continue;
          }
          if (ended || k >= p.k || k <= last) return damaged("indices that do not ascend below K");
          last = k;
          ++count;
        }
        if (lane == 0 && count != static_cast<int64_t>(p.offset[s + 1] - p.offset[s]))
          return damaged("a slice longer than its first row");
        if (count > before || (place < p.n && count == before && row < row_before))
          return damaged("rows that are not sorted");
        if (place >= p.n && count != 0) return damaged("values beyond N");
        before = count;
        row_before = row;
        nonzeros += count;
      }
    if (nonzeros != h.nonzeros) return damaged("values that do not match the header's non-zeros");
    if (!all_zero(l.middle + 4 * l.groups * kSellRows, l.value)) return damaged("a gap that is not zero");
    if (!all_zero(l.value + kSellStepBytes * p.total, l.end)) return damaged("a gap that is not zero");
    return "";
  } else {
    const int64_t blocks = ceil_div(p.k, kBlockK);
    for (int64_t c = 0; c < l.groups; ++c) {
      uint64_t used = p.offset[c];
      for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* order = p.order + (c * blocks + b) * 2 * kChunk;
        bool seen[kChunk] = {};
        int before = kBlockK, row_before = -1;
        for (int64_t place = 0; place < kChunk; ++place) {
          const int row = order[place], count = order[kChunk + place];
          if (seen[row]) return damaged("an order that is not a permutation");
          seen[row] = true;
          if (count > before || (count == before && row < row_before)) return damaged("rows that are not sorted");
          if (count != 0 && c * kChunk + row >= p.n) return damaged("values beyond N");
          before = count;
          row_before = row;
          if (static_cast<uint64_t>(count) > p.offset[c + 1] - used)
            return damaged("counts that do not match the offsets");
          int last = -1;
          for (int i = 0; i < count; ++i, ++used) {
            const int k = p.index[used];
            if (k <= last || k >= kBlockK || b * kBlockK + k >= p.k)
              return damaged("indices that do not ascend below K");
            last = k;
          }
        }
      }
      if (used != p.offset[c + 1]) return damaged("counts that do not match the offsets");
    }
    if (!all_zero(l.middle + 2 * kChunk * l.groups * blocks, l.index)) return damaged("a gap that is not zero");
    if (!all_zero(l.index + p.total, l.value)) return damaged("a gap that is not zero");
  }
  if (!std::all_of(p.value, p.value + p.total, stored)) return damaged("a stored zero");
  if (!all_zero(l.value + 4 * p.total, l.end)) return damaged("a gap that is not zero");
  return "";
}

void unpack(const Pack& p, float* weight) {
  if (p.n == 0 || p.k == 0) return;  // an empty tensor has no memory
  std::memset(weight, 0, static_cast<size_t>(p.n * p.k) * 4);
  if (p.format == kBitmap32) {
    const float* value = p.value;
    for (int64_t b = 0; b < ceil_div(p.n, kBitmapColumns); ++b)
      for (int64_t k = 0; k < p.k; ++k)
        for (uint32_t m = p.mask[b * p.k + k]; m != 0; m &= m - 1)
          weight[(b * kBitmapColumns + __builtin_ctz(m)) * p.k + k] = *value++;
  } else if (p.format == kSell16) {
    for (int64_t s = 0; s < ceil_div(p.n, kSellRows); ++s)
      for (uint64_t i = p.offset[s]; i < p.offset[s + 1]; ++i)
        for (int64_t lane = 0; lane < kSellRows; ++lane) {
          const uint8_t* step = p.step + static_cast<int64_t>(i) * kSellStepBytes;
          float w;
          uint16_t k;
          std::memcpy(&w, step + 4 * lane, 4);
          std::memcpy(&k, step + 64 + 2 * lane, 2);
          if (w != 0.0f) weight[int64_t{p.row[s * kSellRows + lane]} * p.k + k] = w;
        }
  } else {
    const int64_t blocks = ceil_div(p.k, kBlockK);
    int64_t used = 0;
    for (int64_t group = 0; group < ceil_div(p.n, kChunk) * blocks; ++group) {
      const uint8_t* order = p.order + group * 2 * kChunk;
      for (int64_t place = 0; place < kChunk; ++place)
        for (int i = 0; i < order[kChunk + place]; ++i, ++used)
          weight[(group / blocks * kChunk + order[place]) * p.k + group % blocks * kBlockK + p.index[used]] =
              p.value[used];
    }
  }
}

}  // namespace fs::sparse_matmul::formats
