#include "sell4.h"

#include <cstring>

namespace fs::sparse_matmul::formats {
namespace {

// Where each section begins.
struct Layout {
  int64_t slices, offset, row, base, group, end;
  Layout(int64_t n, int64_t groups)
      : slices(ceil_div(n, kSell4Rows)),
        offset(kPackHeaderBytes),
        row(offset + round64(8 * (slices + 1))),
        base(row + 4 * slices * kSell4Rows),
        group(base + round64(2 * kSell4Steps * groups)),
        end(group + kSell4GroupBytes * groups) {}
};

// The bits of an index among the places of its lane.
uint32_t place_bits(int64_t step, int64_t index) {
  return static_cast<uint32_t>(index & 7) << 3 * step | static_cast<uint32_t>(index >> 3) << (31 - step);
}
int64_t index_of(uint32_t places, int64_t step) {
  return static_cast<int64_t>(places >> 3 * step & 7) | static_cast<int64_t>(places >> (31 - step) & 1) << 3;
}

struct Entry {
  int64_t k;
  float value;
};
using Row = std::vector<Entry>;  // the non-zeros of an output, k ascending

// The one pack of these rows.
std::vector<uint8_t> build(const std::vector<Row>& rows, int64_t k) {
  const auto n = static_cast<int64_t>(rows.size());
  std::vector<int64_t> count;
  int64_t nonzeros = 0;
  for (const Row& row : rows) nonzeros += count.emplace_back(static_cast<int64_t>(row.size()));
  const std::vector<uint32_t> order = descending(count);
  // The number of groups is known only at the end: sections are made apart.
  const int64_t slices = Layout(n, 0).slices;
  std::vector<uint64_t> offset(1);
  std::vector<uint32_t> row_of(static_cast<size_t>(slices * kSell4Rows), UINT32_MAX);
  std::copy(order.begin(), order.end(), row_of.begin());
  std::vector<uint16_t> base;
  std::vector<uint8_t> group;
  for (int64_t slice = 0; slice < slices; ++slice) {
    const int64_t lanes = std::min(kSell4Rows, n - slice * kSell4Rows);
    const Row* row[kSell4Rows];
    size_t next[kSell4Rows] = {};
    for (int64_t lane = 0; lane < lanes; ++lane)
      row[lane] = &rows[row_of[static_cast<size_t>(slice * kSell4Rows + lane)]];
    for (int64_t step = 0;; ++step) {
      int64_t first = INT64_MAX;
      for (int64_t lane = 0; lane < lanes; ++lane)
        if (next[lane] < row[lane]->size()) first = std::min(first, (*row[lane])[next[lane]].k);
      if (first == INT64_MAX) break;
      const int64_t j = step % kSell4Steps;
      if (j == 0) {
        base.resize(base.size() + kSell4Steps);
        group.resize(group.size() + kSell4GroupBytes);
      }
      base[base.size() - static_cast<size_t>(kSell4Steps - j)] = static_cast<uint16_t>(first);
      uint8_t* const bytes = group.data() + group.size() - kSell4GroupBytes;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        if (next[lane] == row[lane]->size()) continue;
        const Entry& entry = (*row[lane])[next[lane]];
        if (entry.k - first >= kSell4Window) continue;
        uint32_t places;
        std::memcpy(&places, bytes + 4 * lane, 4);
        places |= place_bits(j, entry.k - first);
        std::memcpy(bytes + 4 * lane, &places, 4);
        std::memcpy(bytes + kSell4PlaceBytes + 4 * (j * kSell4Rows + lane), &entry.value, 4);
        ++next[lane];
      }
    }
    offset.push_back(base.size() / kSell4Steps);
  }
  const Layout l(n, static_cast<int64_t>(offset.back()));
  std::vector<uint8_t> out = begin_pack(kSell4Format, {nullptr, 0, 0, n, k}, nonzeros, l.end);
  const auto put = [&](int64_t at, const auto& section) {
    if (!section.empty()) std::memcpy(out.data() + at, section.data(), section.size() * sizeof section[0]);
  };
  put(l.offset, offset);
  put(l.row, row_of);
  put(l.base, base);
  put(l.group, group);
  return out;
}

std::vector<uint8_t> pack(const Source& s) {
  std::vector<Row> rows(static_cast<size_t>(s.n));
  for (int64_t r = 0; r < s.n; ++r)
    for (int64_t k = 0; k < s.k; ++k)
      if (s.at(r, k) != 0.0f) rows[static_cast<size_t>(r)].push_back({k, s.at(r, k)});
  return build(rows, s.k);
}

std::string view(const PackHeader& h, const uint8_t* bytes, int64_t size, Pack* out) {
  const Layout empty(h.n, 0);
  if (empty.end > size) return "got " + std::to_string(size) + " bytes, expected at least " + std::to_string(empty.end);
  uint64_t groups;  // their number stands behind the last slice
  std::memcpy(&groups, bytes + empty.offset + 8 * empty.slices, 8);
  if (groups > static_cast<uint64_t>(size)) return "got a damaged table: " + std::to_string(groups) + " groups";
  const Layout l(h.n, static_cast<int64_t>(groups));
  const std::string error = size_error(h, size, l.end);
  if (!error.empty()) return error;
  *out = {};
  out->format = kSell4;
  out->n = h.n;
  out->k = h.k;
  out->total = static_cast<int64_t>(groups);
  out->offset = reinterpret_cast<const uint64_t*>(bytes + l.offset);
  out->row = reinterpret_cast<const uint32_t*>(bytes + l.row);
  out->base = reinterpret_cast<const uint16_t*>(bytes + l.base);
  out->group = bytes + l.group;
  return "";
}

// Calls found(row, k, value) for every value that is not zero, slice by slice, lane by lane, whatever row and k are;
// offsets have been checked.
template <class Found>
void each_value(const Pack& p, const Found& found) {
  for (int64_t slice = 0; slice < ceil_div(p.n, kSell4Rows); ++slice)
    for (int64_t lane = 0; lane < kSell4Rows; ++lane)
      for (uint64_t g = p.offset[slice]; g < p.offset[slice + 1]; ++g) {
        const uint8_t* const group = p.group + static_cast<int64_t>(g) * kSell4GroupBytes;
        uint32_t places;
        std::memcpy(&places, group + 4 * lane, 4);
        for (int64_t step = 0; step < kSell4Steps; ++step) {
          float value;
          std::memcpy(&value, group + kSell4PlaceBytes + 4 * (step * kSell4Rows + lane), 4);
          const int64_t base = p.base[static_cast<int64_t>(g) * kSell4Steps + step];
          if (value != 0.0f) found(p.row[slice * kSell4Rows + lane], base + index_of(places, step), value);
        }
      }
}

// Its rows are packed once more: there is one pack of them, and so every byte is seen.
std::string damage(const PackHeader& h, const Pack& p, const uint8_t* bytes) {
  const std::string error = offsets_damage(p.offset, ceil_div(p.n, kSell4Rows), p.total);
  if (!error.empty()) return error;
  std::vector<Row> rows(static_cast<size_t>(p.n));
  bool sound = true;
  each_value(p, [&](uint32_t row, int64_t k, float value) {
    sound = sound && row < p.n && k < p.k && (rows[row].empty() || rows[row].back().k < k);
    if (sound) rows[row].push_back({k, value});
  });
  if (!sound) return damaged("indices that do not ascend below K, or rows beyond N");
  const std::vector<uint8_t> again = build(rows, p.k);
  if (std::equal(again.begin(), again.end(), bytes, bytes + h.bytes)) return "";
  return damaged("values and places that do not fit each other or the header");
}

void unpack(const Pack& p, float* weight) {
  each_value(p, [&](uint32_t row, int64_t k, float value) { weight[int64_t{row} * p.k + k] = value; });
}

}  // namespace

const PackedFormat kSell4Format{kSell4, "sell4", kSell4Rows, kMaxSellK, &pack, &view, &damage, &unpack};

}  // namespace fs::sparse_matmul::formats
