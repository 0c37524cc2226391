#include "panels128.h"

namespace fs::sparse_matmul::formats {
namespace {

// Where each section begins.
struct Layout {
  int64_t chunks, blocks, offset, order, index, value, end;
  Layout(int64_t n, int64_t k, int64_t total)
      : chunks(ceil_div(n, kChunk)),
        blocks(ceil_div(k, kBlockK)),
        offset(kPackHeaderBytes),
        order(offset + round64(8 * (chunks + 1))),
        index(order + round64(2 * kChunk * chunks * blocks)),
        value(index + round64(total + kSlack)),
        end(value + round64(4 * (total + kSlack))) {}
};

std::vector<uint8_t> pack(const Source& s) {
  const int64_t nonzeros = s.nonzeros();
  const Layout l(s.n, s.k, nonzeros);
  std::vector<uint8_t> out = begin_pack(kPanels128Format, s, nonzeros, l.end);
  auto* offset = reinterpret_cast<uint64_t*>(out.data() + l.offset);
  auto* value = reinterpret_cast<float*>(out.data() + l.value);
  uint8_t *order = out.data() + l.order, *index = out.data() + l.index;
  uint64_t used = 0;
  std::vector<int64_t> count(kChunk);
  for (int64_t chunk = 0; chunk < l.chunks; ++chunk) {
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
  offset[l.chunks] = used;
  return out;
}

std::string view(const PackHeader& h, const uint8_t* bytes, int64_t size, Pack* out) {
  const Layout l(h.n, h.k, h.nonzeros);
  const std::string error = size_error(h, size, l.end);
  if (!error.empty()) return error;
  *out = {};
  out->format = kPanels128;
  out->n = h.n;
  out->k = h.k;
  out->total = h.nonzeros;
  out->offset = reinterpret_cast<const uint64_t*>(bytes + l.offset);
  out->order = bytes + l.order;
  out->index = bytes + l.index;
  out->value = reinterpret_cast<const float*>(bytes + l.value);
  return "";
}

std::string damage(const PackHeader&, const Pack& p, const uint8_t* bytes) {
  const Layout l(p.n, p.k, p.total);
  const std::string error = offsets_damage(p.offset, l.chunks, p.total);
  if (!error.empty()) return error;
  for (int64_t c = 0; c < l.chunks; ++c) {
    uint64_t used = p.offset[c];
    for (int64_t b = 0; b < l.blocks; ++b) {
      const uint8_t* order = p.order + (c * l.blocks + b) * 2 * kChunk;
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
          if (k <= last || k >= kBlockK || b * kBlockK + k >= p.k) return damaged("indices that do not ascend below K");
          last = k;
        }
      }
    }
    if (used != p.offset[c + 1]) return damaged("counts that do not match the offsets");
  }
  if (!all_zero(bytes + l.offset + 8 * (l.chunks + 1), bytes + l.order) ||
      !all_zero(bytes + l.order + 2 * kChunk * l.chunks * l.blocks, bytes + l.index) ||
      !all_zero(p.index + p.total, bytes + l.value))
    return damaged(kGap);
  return values_damage(p.value, p.total, bytes + l.end);
}

void unpack(const Pack& p, float* weight) {
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

}  // namespace

const PackedFormat kPanels128Format{kPanels128, "panels128", kBlockK, kLargestSide, &pack, &view, &damage, &unpack};

}  // namespace fs::sparse_matmul::formats
