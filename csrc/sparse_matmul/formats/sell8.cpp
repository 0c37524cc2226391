#include "sell8.h"

#include <cstring>

#include "sparse.h"

namespace fs::sparse_matmul::formats {
namespace {

// Where each section begins; kRows: outputs of a slice, and k of a window; T: float, or uint16_t for bfloat16.
template <int64_t kRows, class T>
struct Layout {
  int64_t slices, offset, row, base, group, end;
  Layout(int64_t n, int64_t groups)
      : slices(ceil_div(n, kRows)),
        offset(kPackHeaderBytes),
        row(offset + round64(8 * (slices + 1))),
        base(row + 4 * slices * kRows),
        group(base + round64(2 * kSell8Steps * groups)),
        end(group + sell8_group_bytes(kRows, sizeof(T)) * groups) {}
};

// Where lane `lane` of step `step` (counted from the first of the pack) has its value and its index.
template <int64_t kRows, class T>
int64_t value_at(int64_t step, int64_t lane) {
  const int64_t place = sizeof(T) == 4 ? lane : lane / 32 * 32 + lane % 16 * 2 + lane / 16 % 2;
  return step / kSell8Steps * sell8_group_bytes(kRows, sizeof(T)) + kSell8Steps * kRows +
         (step % kSell8Steps * kRows + place) * static_cast<int64_t>(sizeof(T));
}
template <int64_t kRows, class T>
int64_t index_at(int64_t step, int64_t lane) {
  return step / kSell8Steps * sell8_group_bytes(kRows, sizeof(T)) + lane * kSell8Steps + step % kSell8Steps;
}

// A value as it is stored: the high bytes of the float, which are all of a bfloat16's.
template <class T>
void put_value(uint8_t* at, float value) {
  std::memcpy(at, reinterpret_cast<const uint8_t*>(&value) + 4 - sizeof(T), sizeof(T));
}
template <class T>
float get_value(const uint8_t* at) {
  float value = 0;
  std::memcpy(reinterpret_cast<uint8_t*>(&value) + 4 - sizeof(T), at, sizeof(T));
  return value;
}

// The non-zeros of a row, k ascending.
struct Row {
  std::vector<int64_t> k;
  size_t next = 0;
  bool ended() const { return next == k.size(); }
};

// Walks a slice step by step as the layout says: store(step, base) begins a step, put(step, lane, k, index) fills it.
// Returns the number of steps.
template <int64_t kRows, class Store, class Put>
int64_t walk(std::vector<Row>& rows, const Store& store, const Put& put) {
  for (int64_t step = 0;; ++step) {
    int64_t first = INT64_MAX;
    for (const Row& row : rows)
      if (!row.ended()) first = std::min(first, row.k[row.next]);
    if (first == INT64_MAX) return step;
    const int64_t base = first / kSell8Base;
    store(step, base);
    for (size_t lane = 0; lane < rows.size(); ++lane) {
      Row& row = rows[lane];
      if (row.ended() || row.k[row.next] - base * kSell8Base >= kRows) continue;
      put(step, static_cast<int64_t>(lane), row.k[row.next], row.k[row.next] - base * kSell8Base);
      ++row.next;
    }
  }
}

template <int64_t kRows, class T>
const PackedFormat& format_of() {
  if constexpr (sizeof(T) == 2) return kRows == kSell8Rows ? kSell8Bf16 : kSell8x32Bf16;
  return kRows == kSell8Rows ? kSell8Format : kSell8x32Format;
}

template <int64_t kRows, class T>
std::vector<uint8_t> pack(const Source& s) {
  std::vector<int64_t> count(static_cast<size_t>(s.n));
  int64_t nonzeros = 0;
  for (int64_t r = 0; r < s.n; ++r) nonzeros += count[static_cast<size_t>(r)] = s.count(r, 0, s.k);
  const std::vector<uint32_t> order = descending(count);
  // The number of groups is known only at the end: sections are made apart.
  const int64_t slices = Layout<kRows, T>(s.n, 0).slices;
  std::vector<uint64_t> offset(1);
  std::vector<uint32_t> row_of(static_cast<size_t>(slices * kRows), UINT32_MAX);
  std::copy(order.begin(), order.end(), row_of.begin());
  std::vector<uint16_t> base;
  std::vector<uint8_t> group;
  for (int64_t slice = 0; slice < slices; ++slice) {
    const int64_t begin = slice * kRows, lanes = std::min(kRows, s.n - begin);
    std::vector<Row> rows(static_cast<size_t>(lanes));
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t k = 0; k < s.k; ++k)
        if (s.at(row_of[static_cast<size_t>(begin + lane)], k) != 0.0f) rows[static_cast<size_t>(lane)].k.push_back(k);
    uint8_t* bytes = nullptr;  // of the group that the step lies in
    walk<kRows>(
        rows,
        [&](int64_t step, int64_t first) {
          if (step % kSell8Steps == 0) {
            base.resize(base.size() + kSell8Steps);
            group.resize(group.size() + sell8_group_bytes(kRows, sizeof(T)));
            bytes = group.data() + group.size() - sell8_group_bytes(kRows, sizeof(T));
          }
          base[base.size() - kSell8Steps + static_cast<size_t>(step % kSell8Steps)] = static_cast<uint16_t>(first);
        },
        [&](int64_t step, int64_t lane, int64_t k, int64_t index) {
          const float w = s.at(row_of[static_cast<size_t>(begin + lane)], k);
          put_value<T>(bytes + value_at<kRows, T>(step % kSell8Steps, lane), w);
          bytes[index_at<kRows, T>(step % kSell8Steps, lane)] = static_cast<uint8_t>(index);
        });
    offset.push_back(base.size() / kSell8Steps);
  }
  const Layout<kRows, T> l(s.n, static_cast<int64_t>(offset.back()));
  std::vector<uint8_t> out = begin_pack(format_of<kRows, T>(), s, nonzeros, l.end);
  const auto put = [&](int64_t at, const auto& section) {
    if (!section.empty()) std::memcpy(out.data() + at, section.data(), section.size() * sizeof section[0]);
  };
  put(l.offset, offset);
  put(l.row, row_of);
  put(l.base, base);
  put(l.group, group);
  return out;
}

template <int64_t kRows, class T>
std::string view(const PackHeader& h, const uint8_t* bytes, int64_t size, Pack* out) {
  const Layout<kRows, T> empty(h.n, 0);
  if (empty.end > size) return "got " + std::to_string(size) + " bytes, expected at least " + std::to_string(empty.end);
  uint64_t groups;  // their number stands behind the last slice
  std::memcpy(&groups, bytes + empty.offset + 8 * empty.slices, 8);
  if (groups > static_cast<uint64_t>(size)) return "got a damaged table: " + std::to_string(groups) + " groups";
  const Layout<kRows, T> l(h.n, static_cast<int64_t>(groups));
  const std::string error = size_error(h, size, l.end);
  if (!error.empty()) return error;
  *out = {};
  out->format = kSell8;
  out->block = h.block;
  out->bf16 = sizeof(T) == 2;
  out->n = h.n;
  out->k = h.k;
  out->total = static_cast<int64_t>(groups);
  out->offset = reinterpret_cast<const uint64_t*>(bytes + l.offset);
  out->row = reinterpret_cast<const uint32_t*>(bytes + l.row);
  out->base = reinterpret_cast<const uint16_t*>(bytes + l.base);
  out->group = bytes + l.group;
  return "";
}

template <int64_t kRows, class T>
float value_of(const Pack& p, int64_t step, int64_t lane) {
  return get_value<T>(p.group + value_at<kRows, T>(step, lane));
}

// The k of a lane, whether or not there is a value.
template <int64_t kRows, class T>
int64_t k_of(const Pack& p, int64_t step, int64_t lane) {
  return int64_t{p.base[step]} * kSell8Base + p.group[index_at<kRows, T>(step, lane)];
}

// The non-zeros of a slice, which walk() then steps through once more; the steps are what they are if every one of them
// is walked through alike.
template <int64_t kRows, class T>
std::string slice_damage(const Pack& p, int64_t slice, int64_t* nonzeros) {
  const int64_t begin = static_cast<int64_t>(p.offset[slice]) * kSell8Steps;
  const int64_t end = static_cast<int64_t>(p.offset[slice + 1]) * kSell8Steps;
  std::vector<Row> rows(kRows);
  for (int64_t lane = 0; lane < kRows; ++lane) {
    std::vector<int64_t>& ks = rows[static_cast<size_t>(lane)].k;
    for (int64_t step = begin; step < end; ++step) {
      const float value = value_of<kRows, T>(p, step, lane);
      if (value == 0.0f) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (bits != 0 || p.group[index_at<kRows, T>(step, lane)] != 0) return damaged("padding that is not zero");
        continue;
      }
      const int64_t k = k_of<kRows, T>(p, step, lane);
      if (k >= p.k || (!ks.empty() && k <= ks.back())) return damaged("indices that do not ascend below K");
      ks.push_back(k);
    }
    const int64_t place = slice * kRows + lane;
    if (place >= p.n && !ks.empty()) return damaged("values beyond N");
    *nonzeros += static_cast<int64_t>(ks.size());
  }
  for (int64_t lane = 1; lane < kRows && slice * kRows + lane < p.n; ++lane) {
    const size_t above = rows[static_cast<size_t>(lane - 1)].k.size(), here = rows[static_cast<size_t>(lane)].k.size();
    const uint32_t* const row = p.row + slice * kRows + lane;
    if (here > above || (here == above && row[0] < row[-1])) return damaged("rows that are not sorted");
  }
  bool same = true;
  const int64_t steps = walk<kRows>(
      rows, [&](int64_t step, int64_t base) { same = same && begin + step < end && p.base[begin + step] == base; },
      [&](int64_t step, int64_t lane, int64_t k, int64_t) {
        same = same && value_of<kRows, T>(p, begin + step, lane) != 0.0f && k_of<kRows, T>(p, begin + step, lane) == k;
      });
  for (int64_t step = begin + steps; step < end; ++step) same = same && p.base[step] == 0;
  if (!same || ceil_div(steps, kSell8Steps) * kSell8Steps != end - begin)
    return damaged("steps that are not the fewest");
  return "";
}

template <int64_t kRows, class T>
std::string damage(const PackHeader& h, const Pack& p, const uint8_t* bytes) {
  const Layout<kRows, T> l(p.n, p.total);
  const std::string error = offsets_damage(p.offset, l.slices, p.total);
  if (!error.empty()) return error;
  std::vector<bool> seen(static_cast<size_t>(p.n));
  for (int64_t place = 0; place < l.slices * kRows; ++place) {
    const uint32_t row = p.row[place];
    if (place >= p.n ? row != UINT32_MAX : row >= p.n || seen[row])
      return damaged("rows that are not a permutation of N");
    if (place < p.n) seen[row] = true;
  }
  int64_t nonzeros = 0, before = p.k;
  uint32_t row_before = 0;
  for (int64_t s = 0; s < l.slices; ++s) {
    const std::string wrong = slice_damage<kRows, T>(p, s, &nonzeros);
    if (!wrong.empty()) return wrong;
    // Across the edge of two slices, too, rows descend.
    const int64_t last = std::min(kRows, p.n - s * kRows) - 1;
    int64_t first_count = 0, last_count = 0;
    for (int64_t step = static_cast<int64_t>(p.offset[s]) * kSell8Steps;
         step < static_cast<int64_t>(p.offset[s + 1]) * kSell8Steps; ++step) {
      first_count += value_of<kRows, T>(p, step, 0) != 0.0f;
      last_count += value_of<kRows, T>(p, step, last) != 0.0f;
    }
    const uint32_t first_row = p.row[s * kRows];
    if (first_count > before || (s > 0 && first_count == before && first_row < row_before))
      return damaged("rows that are not sorted");
    before = last_count;
    row_before = p.row[s * kRows + last];
  }
  if (nonzeros != h.nonzeros) return damaged("values that do not match the header's non-zeros");
  if (!all_zero(bytes + l.offset + 8 * (l.slices + 1), bytes + l.row) ||
      !all_zero(bytes + l.base + 2 * kSell8Steps * p.total, bytes + l.group))
    return damaged(kGap);
  return "";
}

template <int64_t kRows, class T>
void unpack(const Pack& p, float* weight) {
  for (int64_t s = 0; s < ceil_div(p.n, kRows); ++s)
    for (int64_t step = static_cast<int64_t>(p.offset[s]) * kSell8Steps;
         step < static_cast<int64_t>(p.offset[s + 1]) * kSell8Steps; ++step)
      for (int64_t lane = 0; lane < kRows; ++lane) {
        const float value = value_of<kRows, T>(p, step, lane);
        if (value != 0.0f) weight[int64_t{p.row[s * kRows + lane]} * p.k + k_of<kRows, T>(p, step, lane)] = value;
      }
}

template <int64_t kRows, class T>
constexpr PackedFormat make(const char* name) {
  return {kSell8,
          name,
          kRows,
          kMaxSellK,
          &pack<kRows, T>,
          &view<kRows, T>,
          &damage<kRows, T>,
          &unpack<kRows, T>,
          sizeof(T) == 2 ? kDTypeBf16 : kDTypeF32};
}

}  // namespace

const PackedFormat kSell8Format = make<kSell8Rows, float>("sell8");
const PackedFormat kSell8x32Format = make<kSell8x32Rows, float>("sell8x32");
const PackedFormat kSell8Bf16 = make<kSell8Rows, uint16_t>("sell8");
const PackedFormat kSell8x32Bf16 = make<kSell8x32Rows, uint16_t>("sell8x32");

}  // namespace fs::sparse_matmul::formats
