#include "sell16.h"

#include <cstring>

namespace fs::sparse_matmul::formats {
namespace {

// Where each section begins.
struct Layout {
  int64_t slices, offset, row, step, end;
  Layout(int64_t n, int64_t steps)
      : slices(ceil_div(n, kSell16Rows)),
        offset(kPackHeaderBytes),
        row(offset + round64(8 * (slices + 1))),
        step(row + round64(4 * slices * kSell16Rows)),
        end(step + round64(kSell16StepBytes * steps)) {}
};

// The value and the index of one lane of a step.
struct Lane {
  float value;
  uint16_t k;
  Lane(const uint8_t* step, int64_t lane) {
    std::memcpy(&value, step + 4 * lane, 4);
    std::memcpy(&k, step + 64 + 2 * lane, 2);
  }
};

std::vector<uint8_t> pack(const Source& s) {
  std::vector<int64_t> count(static_cast<size_t>(s.n));
  int64_t nonzeros = 0, steps = 0;
  for (int64_t r = 0; r < s.n; ++r) nonzeros += count[static_cast<size_t>(r)] = s.count(r, 0, s.k);
  const std::vector<uint32_t> order = descending(count);
  for (int64_t r = 0; r < s.n; r += kSell16Rows) steps += count[order[static_cast<size_t>(r)]];
  const Layout l(s.n, steps);
  std::vector<uint8_t> out = begin_pack(kSell16Format, s, nonzeros, l.end);
  auto* offset = reinterpret_cast<uint64_t*>(out.data() + l.offset);
  auto* row = reinterpret_cast<uint32_t*>(out.data() + l.row);
  uint64_t used = 0;
  for (int64_t slice = 0; slice < l.slices; ++slice) {
    offset[slice] = used;
    for (int64_t lane = 0; lane < kSell16Rows; ++lane) {
      const int64_t place = slice * kSell16Rows + lane;
      row[place] = place < s.n ? order[static_cast<size_t>(place)] : UINT32_MAX;
      if (place >= s.n) continue;
      uint8_t* step = out.data() + l.step + static_cast<int64_t>(used) * kSell16StepBytes;
      for (int64_t k = 0; k < s.k; ++k) {
        const float w = s.at(row[place], k);
        if (w == 0.0f) continue;
        const auto index = static_cast<uint16_t>(k);
        std::memcpy(step + 4 * lane, &w, 4);
        std::memcpy(step + 64 + 2 * lane, &index, 2);
        step += kSell16StepBytes;
      }
    }
    used += static_cast<uint64_t>(count[row[slice * kSell16Rows]]);
  }
  offset[l.slices] = used;
  return out;
}

std::string view(const PackHeader& h, const uint8_t* bytes, int64_t size, Pack* out) {
  const Layout empty(h.n, 0);
  if (empty.end > size) return "got " + std::to_string(size) + " bytes, expected at least " + std::to_string(empty.end);
  uint64_t steps;  // their number stands behind the last slice
  std::memcpy(&steps, bytes + empty.offset + 8 * empty.slices, 8);
  if (steps > static_cast<uint64_t>(size)) return "got a damaged table: " + std::to_string(steps) + " steps";
  const Layout l(h.n, static_cast<int64_t>(steps));
  const std::string error = size_error(h, size, l.end);
  if (!error.empty()) return error;
  *out = {};
  out->format = kSell16;
  out->n = h.n;
  out->k = h.k;
  out->total = static_cast<int64_t>(steps);
  out->offset = reinterpret_cast<const uint64_t*>(bytes + l.offset);
  out->row = reinterpret_cast<const uint32_t*>(bytes + l.row);
  out->step = bytes + l.step;
  return "";
}

std::string damage(const PackHeader& h, const Pack& p, const uint8_t* bytes) {
  const Layout l(p.n, p.total);
  const std::string error = offsets_damage(p.offset, l.slices, p.total);
  if (!error.empty()) return error;
  std::vector<bool> seen(static_cast<size_t>(p.n));
  int64_t nonzeros = 0, before = p.k, row_before = -1;
  for (int64_t s = 0; s < l.slices; ++s)
    for (int64_t lane = 0; lane < kSell16Rows; ++lane) {
      const int64_t place = s * kSell16Rows + lane;
      const uint32_t row = p.row[place];
      if (place >= p.n ? row != UINT32_MAX : row >= p.n || seen[row])
        return damaged("rows that are not a permutation of N");
      if (place < p.n) seen[row] = true;
      int64_t last = -1, count = 0;
      bool ended = false;
      for (uint64_t i = p.offset[s]; i < p.offset[s + 1]; ++i) {
        const Lane w(p.step + static_cast<int64_t>(i) * kSell16StepBytes, lane);
        if (w.value == 0.0f) {
          uint32_t bits;
          std::memcpy(&bits, &w.value, 4);
          if (w.k != 0 || bits != 0) return damaged("padding that is not zero");
          ended = true;
          continue;
        }
        if (ended || w.k >= p.k || w.k <= last) return damaged("indices that do not ascend below K");
        last = w.k;
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
  if (!all_zero(bytes + l.offset + 8 * (l.slices + 1), bytes + l.row) ||
      !all_zero(bytes + l.row + 4 * l.slices * kSell16Rows, bytes + l.step) ||
      !all_zero(bytes + l.step + kSell16StepBytes * p.total, bytes + l.end))
    return damaged(kGap);
  return "";
}

void unpack(const Pack& p, float* weight) {
  for (int64_t s = 0; s < ceil_div(p.n, kSell16Rows); ++s)
    for (uint64_t i = p.offset[s]; i < p.offset[s + 1]; ++i)
      for (int64_t lane = 0; lane < kSell16Rows; ++lane) {
        const Lane w(p.step + static_cast<int64_t>(i) * kSell16StepBytes, lane);
        if (w.value != 0.0f) weight[int64_t{p.row[s * kSell16Rows + lane]} * p.k + w.k] = w.value;
      }
}

}  // namespace

const PackedFormat kSell16Format{kSell16, "sell16", kSell16Rows, kMaxSellK, &pack, &view, &damage, &unpack};

}  // namespace fs::sparse_matmul::formats
