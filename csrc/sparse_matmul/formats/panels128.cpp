#include "panels128.h"

#include <cstring>

#include "sparse.h"

namespace fs::sparse_matmul::formats {
namespace {

// Where each section begins.
struct Layout {
  int64_t width, groups, chunks, blocks, table, offset, order, index, value, end;
  Layout(int64_t n, int64_t k, int64_t steps, int64_t value_bytes)
      : width(panel_width(n)),
        groups(width / kGroup),
        chunks(ceil_div(n, width)),
        blocks(ceil_div(k, kBlockK)),
        table(width + groups),
        offset(kPackHeaderBytes),
        order(offset + round64(8 * (chunks + 1))),
        index(order + round64(table * chunks * blocks)),
        value(index + round64(kGroup * steps)),
        end(value + round64(value_bytes * kGroup * steps)) {}
};

// A value of a pack: float32, or the high half of one.
void put(float w, float* out) { *out = w; }
void put(float w, uint16_t* out) {
  uint32_t bits;
  std::memcpy(&bits, &w, 4);
  *out = static_cast<uint16_t>(bits >> 16);
}
float widened(uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  float w;
  std::memcpy(&w, &bits, 4);
  return w;
}
float value_at(const Pack& p, int64_t i) { return p.value16 == nullptr ? p.value[i] : widened(p.value16[i]); }

// The rows of a chunk, in a block of k, as they are stored.
struct Sorted {
  std::vector<int64_t> count;
  std::vector<uint32_t> order;
  Sorted(const Source& s, const Layout& l, int64_t chunk, int64_t block) : count(static_cast<size_t>(l.width)) {
    const int64_t k = block * kBlockK, end = std::min(k + kBlockK, s.k);
    for (int64_t r = 0; r < l.width; ++r) count[static_cast<size_t>(r)] = s.count(chunk * l.width + r, k, end);
    order = descending(count);
  }
  int64_t row(int64_t place) const { return order[static_cast<size_t>(place)]; }
  int64_t steps(int64_t group) const { return count[order[static_cast<size_t>(group * kGroup)]]; }
};

// The k % 192 and the values of one row, 8 apart, and zeros up to `steps`.
template <class Value>
void fill_row(const Source& s, int64_t row, int64_t k, int64_t steps, uint8_t* index, Value* value) {
  const int64_t end = row < s.n ? std::min(k + kBlockK, s.k) : k;
  int64_t step = 0;
  for (int64_t i = k; i < end; ++i) {
    const float w = s.at(row, i);
    if (w == 0.0f) continue;
    index[step * kGroup] = static_cast<uint8_t>(i - k);
    put(w, value + step++ * kGroup);
  }
  for (const uint8_t last = step > 0 ? index[(step - 1) * kGroup] : uint8_t{0}; step < steps; ++step)
    index[step * kGroup] = last;
}

template <class Value>
std::vector<uint8_t> pack(const Source& s) {
  const Layout empty(s.n, s.k, 0, sizeof(Value));
  int64_t steps = 0;
  for (int64_t chunk = 0; chunk < empty.chunks; ++chunk)
    for (int64_t block = 0; block < empty.blocks; ++block) {
      const Sorted sorted(s, empty, chunk, block);
      for (int64_t g = 0; g < empty.groups; ++g) steps += sorted.steps(g);
    }
  const Layout l(s.n, s.k, steps, sizeof(Value));
  const PackedFormat& format = sizeof(Value) == 2 ? kPanels128Bf16 : kPanels128Format;
  std::vector<uint8_t> out = begin_pack(format, s, s.nonzeros(), l.end);
  auto* offset = reinterpret_cast<uint64_t*>(out.data() + l.offset);
  auto* value = reinterpret_cast<Value*>(out.data() + l.value);
  uint8_t *order = out.data() + l.order, *index = out.data() + l.index;
  uint64_t used = 0;
  for (int64_t chunk = 0; chunk < l.chunks; ++chunk) {
    offset[chunk] = used;
    for (int64_t block = 0; block < l.blocks; ++block, order += l.table) {
      const Sorted sorted(s, l, chunk, block);
      for (int64_t place = 0; place < l.width; ++place) order[place] = static_cast<uint8_t>(sorted.row(place));
      for (int64_t g = 0; g < l.groups; ++g) {
        const int64_t group_steps = sorted.steps(g);
        order[l.width + g] = static_cast<uint8_t>(group_steps);
        for (int64_t lane = 0; lane < kGroup; ++lane) {
          const int64_t at = static_cast<int64_t>(used) * kGroup + lane;
          fill_row(s, chunk * l.width + sorted.row(g * kGroup + lane), block * kBlockK, group_steps, index + at,
                   value + at);
        }
        used += static_cast<uint64_t>(group_steps);
      }
    }
  }
  offset[l.chunks] = used;
  return out;
}

int64_t value_bytes(const PackHeader& h) { return h.dtype == kDTypeBf16 ? 2 : 4; }

std::string view(const PackHeader& h, const uint8_t* bytes, int64_t size, Pack* out) {
  const Layout empty(h.n, h.k, 0, 4);
  if (empty.end > size) return "got " + std::to_string(size) + " bytes, expected at least " + std::to_string(empty.end);
  uint64_t steps;  // their number stands behind the last chunk
  std::memcpy(&steps, bytes + empty.offset + 8 * empty.chunks, 8);
  if (steps > static_cast<uint64_t>(size)) return "got a damaged table: " + std::to_string(steps) + " steps";
  const Layout l(h.n, h.k, static_cast<int64_t>(steps), value_bytes(h));
  const std::string error = size_error(h, size, l.end);
  if (!error.empty()) return error;
  *out = {};
  out->format = kPanels128;
  out->n = h.n;
  out->k = h.k;
  out->total = static_cast<int64_t>(steps);
  out->offset = reinterpret_cast<const uint64_t*>(bytes + l.offset);
  out->order = bytes + l.order;
  out->index = bytes + l.index;
  out->bf16 = h.dtype == kDTypeBf16;
  if (out->bf16)
    out->value16 = reinterpret_cast<const uint16_t*>(bytes + l.value);
  else
    out->value = reinterpret_cast<const float*>(bytes + l.value);
  return "";
}

bool positive_zero(float w) {
  uint32_t bits;
  std::memcpy(&bits, &w, 4);
  return bits == 0;
}

// One row of a group in a block that begins at k; empty, and its number of non-zeros, if all is right.
std::string row_damage(const Pack& p, int64_t k, uint64_t begin, int64_t steps, int64_t lane, int64_t* count) {
  int last = -1;
  *count = 0;
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t at = (static_cast<int64_t>(begin) + i) * kGroup + lane;
    const int index = p.index[at];
    const float w = value_at(p, at);
    if (w == 0.0f) {
      if (!positive_zero(w) || index != std::max(last, 0)) return damaged("padding that is not zero");
      continue;
    }
    if (*count != i || index <= last || index >= kBlockK || k + index >= p.k)
      return damaged("indices that do not ascend below K");
    last = index;
    ++*count;
  }
  return "";
}

std::string damage(const PackHeader& h, const Pack& p, const uint8_t* bytes) {
  const Layout l(p.n, p.k, p.total, value_bytes(h));
  std::string error = offsets_damage(p.offset, l.chunks, p.total);
  if (!error.empty()) return error;
  int64_t nonzeros = 0;
  for (int64_t c = 0; c < l.chunks; ++c) {
    uint64_t used = p.offset[c];
    for (int64_t b = 0; b < l.blocks; ++b) {
      const uint8_t* order = p.order + (c * l.blocks + b) * l.table;
      bool seen[kChunk] = {};
      int64_t before = kBlockK, row_before = -1;
      for (int64_t place = 0; place < l.width; ++place) {
        const int64_t row = order[place], steps = order[l.width + place / kGroup], lane = place % kGroup;
        if (row >= l.width || seen[row]) return damaged("an order that is not a permutation");
        seen[row] = true;
        if (static_cast<uint64_t>(steps) > p.offset[c + 1] - used)
          return damaged("steps that do not match the offsets");
        int64_t count;
        error = row_damage(p, b * kBlockK, used, steps, lane, &count);
        if (!error.empty()) return error;
        if (lane == 0 && count != steps) return damaged("a group longer than its first row");
        if (count > before || (count == before && row < row_before)) return damaged("rows that are not sorted");
        if (count != 0 && c * l.width + row >= p.n) return damaged("values beyond N");
        before = count;
        row_before = row;
        nonzeros += count;
        if (lane == kGroup - 1) used += static_cast<uint64_t>(steps);
      }
    }
    if (used != p.offset[c + 1]) return damaged("steps that do not match the offsets");
  }
  if (nonzeros != h.nonzeros) return damaged("values that do not match the header's non-zeros");
  if (!all_zero(bytes + l.offset + 8 * (l.chunks + 1), bytes + l.order) ||
      !all_zero(bytes + l.order + l.table * l.chunks * l.blocks, bytes + l.index) ||
      !all_zero(p.index + kGroup * p.total, bytes + l.value) ||
      !all_zero(bytes + l.value + value_bytes(h) * kGroup * p.total, bytes + l.end))
    return damaged(kGap);
  return "";
}

void unpack(const Pack& p, float* weight) {
  const Layout l(p.n, p.k, p.total, 4);
  int64_t step = 0;
  for (int64_t part = 0; part < l.chunks * l.blocks; ++part) {
    const uint8_t* order = p.order + part * l.table;
    for (int64_t g = 0; g < l.groups; ++g)
      for (const int64_t end = step + order[l.width + g]; step < end; ++step)
        for (int64_t lane = 0; lane < kGroup; ++lane) {
          const float w = value_at(p, step * kGroup + lane);
          const int64_t row = part / l.blocks * l.width + order[g * kGroup + lane];
          if (w != 0.0f) weight[row * p.k + part % l.blocks * kBlockK + p.index[step * kGroup + lane]] = w;
        }
  }
}

template <class Value>
constexpr PackedFormat make(uint32_t dtype) {
  return {kPanels128, "panels128", kBlockK, kLargestSide, &pack<Value>, &view, &damage, &unpack, dtype};
}

}  // namespace

const PackedFormat kPanels128Format = make<float>(kDTypeF32);
const PackedFormat kPanels128Bf16 = make<uint16_t>(kDTypeBf16);

}  // namespace fs::sparse_matmul::formats
