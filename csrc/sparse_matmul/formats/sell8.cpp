#include "sell8.h"

#include <cstring>
#include <functional>
#include <numeric>

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

// Walks a slice step by step as the layout says, with windows of kWindow k: store(step, base) begins a step, put(step,
// lane, k, index) fills it. Returns the number of steps.
template <int64_t kWindow, class Store, class Put>
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
      if (row.ended() || row.k[row.next] - base * kSell8Base >= kWindow) continue;
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

// k of a window of slices of so many outputs.
constexpr int64_t window(int64_t rows) { return rows == kSell8x16Rows ? kSell8x32Rows : rows; }

// Slices of one width as they are made: the number of groups is known only at the end, so sections are made apart.
struct Slices {
  std::vector<uint64_t> offset{0};
  std::vector<uint32_t> row;
  std::vector<uint16_t> base;
  std::vector<uint8_t> group;
};

// Outputs [begin, end) of `order` in slices of kRows.
template <int64_t kRows, class T>
Slices make_slices(const Source& s, const std::vector<uint32_t>& order, int64_t begin, int64_t end) {
  Slices out;
  out.row.resize(static_cast<size_t>(ceil_div(end - begin, kRows) * kRows), UINT32_MAX);
  std::copy(order.begin() + begin, order.begin() + end, out.row.begin());
  std::vector<uint16_t>& base = out.base;
  std::vector<uint8_t>& group = out.group;
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t lanes = std::min(kRows, end - first);
    std::vector<Row> rows(static_cast<size_t>(lanes));
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t k = 0; k < s.k; ++k)
        if (s.at(order[static_cast<size_t>(first + lane)], k) != 0.0f) rows[static_cast<size_t>(lane)].k.push_back(k);
    uint8_t* bytes = nullptr;  // of the group that the step lies in
    walk<window(kRows)>(
        rows,
        [&](int64_t step, int64_t at) {
          if (step % kSell8Steps == 0) {
            base.resize(base.size() + kSell8Steps);
            group.resize(group.size() + sell8_group_bytes(kRows, sizeof(T)));
            bytes = group.data() + group.size() - sell8_group_bytes(kRows, sizeof(T));
          }
          base[base.size() - kSell8Steps + static_cast<size_t>(step % kSell8Steps)] = static_cast<uint16_t>(at);
        },
        [&](int64_t step, int64_t lane, int64_t k, int64_t index) {
          const float w = s.at(order[static_cast<size_t>(first + lane)], k);
          put_value<T>(bytes + value_at<kRows, T>(step % kSell8Steps, lane), w);
          bytes[index_at<kRows, T>(step % kSell8Steps, lane)] = static_cast<uint8_t>(index);
        });
    out.offset.push_back(base.size() / kSell8Steps);
  }
  return out;
}

// The non-zeros of each row, and the sum.
int64_t count_rows(const Source& s, std::vector<int64_t>* count) {
  int64_t nonzeros = 0;
  for (int64_t r = 0; r < s.n; ++r) {
    count->push_back(s.count(r, 0, s.k));
    nonzeros += count->back();
  }
  return nonzeros;
}

template <class Section>
int64_t put(std::vector<uint8_t>* out, int64_t at, const Section& section) {
  const size_t bytes = section.size() * sizeof section[0];
  if (bytes > 0) std::memcpy(out->data() + at, section.data(), bytes);
  return at + static_cast<int64_t>(bytes);
}

template <int64_t kRows, class T>
std::vector<uint8_t> pack(const Source& s) {
  std::vector<int64_t> count;
  const int64_t nonzeros = count_rows(s, &count);
  const Slices slices = make_slices<kRows, T>(s, descending(count), 0, s.n);
  const Layout<kRows, T> l(s.n, static_cast<int64_t>(slices.offset.back()));
  std::vector<uint8_t> out = begin_pack(format_of<kRows, T>(), s, nonzeros, l.end);
  put(&out, l.offset, slices.offset);
  put(&out, l.row, slices.row);
  put(&out, l.base, slices.base);
  put(&out, l.group, slices.group);
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
// is walked through alike. `outputs` of its lanes have one, whose numbers of non-zeros go to `counts`.
template <int64_t kRows, class T>
std::string slice_damage(const Pack& p, int64_t slice, int64_t outputs, std::vector<int64_t>* counts) {
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
    if (lane >= outputs && !ks.empty()) return damaged("values beyond N");
    if (lane < outputs) counts->push_back(static_cast<int64_t>(ks.size()));
  }
  bool same = true;
  const int64_t steps = walk<window(kRows)>(
      rows, [&](int64_t step, int64_t base) { same = same && begin + step < end && p.base[begin + step] == base; },
      [&](int64_t step, int64_t lane, int64_t k, int64_t) {
        same = same && value_of<kRows, T>(p, begin + step, lane) != 0.0f && k_of<kRows, T>(p, begin + step, lane) == k;
      });
  for (int64_t step = begin + steps; step < end; ++step) same = same && p.base[step] == 0;
  if (!same || ceil_div(steps, kSell8Steps) * kSell8Steps != end - begin)
    return damaged("steps that are not the fewest");
  return "";
}

// Slices of one width for so many outputs.
template <int64_t kRows, class T>
std::string slices_damage(const Pack& p, int64_t outputs, std::vector<int64_t>* counts) {
  const int64_t slices = ceil_div(outputs, kRows);
  std::string error = offsets_damage(p.offset, slices, p.total);
  for (int64_t slice = 0; slice < slices && error.empty(); ++slice)
    error = slice_damage<kRows, T>(p, slice, std::min(kRows, outputs - slice * kRows), counts);
  return error;
}

// Of the outputs in their `places`, with these numbers of non-zeros.
std::string rows_damage(const Pack& p, int64_t places, const std::vector<int64_t>& counts, int64_t nonzeros) {
  std::vector<bool> seen(static_cast<size_t>(p.n));
  for (int64_t place = 0; place < places; ++place) {
    const uint32_t row = p.row[place];
    if (place >= p.n ? row != UINT32_MAX : row >= p.n || seen[row])
      return damaged("rows that are not a permutation of N");
    if (place < p.n) seen[row] = true;
  }
  for (size_t place = 1; place < counts.size(); ++place)
    if (counts[place] > counts[place - 1] || (counts[place] == counts[place - 1] && p.row[place] < p.row[place - 1]))
      return damaged("rows that are not sorted");
  if (std::accumulate(counts.begin(), counts.end(), int64_t{0}) != nonzeros)
    return damaged("values that do not match the header's non-zeros");
  return "";
}

template <int64_t kRows, class T>
std::string damage(const PackHeader& h, const Pack& p, const uint8_t* bytes) {
  const Layout<kRows, T> l(p.n, p.total);
  std::vector<int64_t> counts;
  std::string error = slices_damage<kRows, T>(p, p.n, &counts);
  if (error.empty()) error = rows_damage(p, l.slices * kRows, counts, h.nonzeros);
  if (!error.empty()) return error;
  if (!all_zero(bytes + l.offset + 8 * (l.slices + 1), bytes + l.row) ||
      !all_zero(bytes + l.base + 2 * kSell8Steps * p.total, bytes + l.group))
    return damaged(kGap);
  return "";
}

template <int64_t kRows, class T>
void unpack_slices(const Pack& p, int64_t slices, float* weight) {
  for (int64_t s = 0; s < slices; ++s)
    for (int64_t step = static_cast<int64_t>(p.offset[s]) * kSell8Steps;
         step < static_cast<int64_t>(p.offset[s + 1]) * kSell8Steps; ++step)
      for (int64_t lane = 0; lane < kRows; ++lane) {
        const float value = value_of<kRows, T>(p, step, lane);
        if (value != 0.0f) weight[int64_t{p.row[s * kRows + lane]} * p.k + k_of<kRows, T>(p, step, lane)] = value;
      }
}

template <int64_t kRows, class T>
void unpack(const Pack& p, float* weight) {
  unpack_slices<kRows, T>(p, ceil_div(p.n, kRows), weight);
}

// --- sell8x16 ---

// Where each section begins.
struct MixedLayout {
  int64_t narrow, wide;  // slices
  int64_t offset, row, base, group, end;
  MixedLayout(int64_t n, int64_t narrow_slices, int64_t narrow_groups, int64_t wide_groups)
      : narrow(narrow_slices),
        wide(ceil_div(n - narrow * kSell8x16Rows, kSell8Rows)),
        offset(kPackHeaderBytes + 8),
        row(kPackHeaderBytes + round64(8 * (narrow + wide + 3))),
        base(row + 4 * (narrow * kSell8x16Rows + wide * kSell8Rows)),
        group(base + round64(2 * kSell8Steps * (narrow_groups + wide_groups))),
        end(group + sell8_group_bytes(kSell8x16Rows, 4) * narrow_groups +
            sell8_group_bytes(kSell8Rows, 4) * wide_groups) {}
};

// How many slices are narrow, of outputs with these numbers of non-zeros, which descend: formats/sell8.h.
int64_t choose_narrow(const std::vector<int64_t>& counts) {
  // A step of 16 outputs takes about 0.43 of the time of one of 64 on Zen 5.
  constexpr int64_t kNarrowStep = 7, kWideStep = 16;
  const auto n = static_cast<int64_t>(counts.size()), places = ceil_div(n, kSell8x16Rows);
  const auto longest = [&](int64_t place) { return counts[static_cast<size_t>(place * kSell8x16Rows)]; };
  // What slices of 64 take from each place on.
  std::vector<int64_t> wide(static_cast<size_t>(places + kSell8Rows / kSell8x16Rows));
  for (int64_t place = places - 1; place >= 0; --place)
    wide[static_cast<size_t>(place)] =
        kWideStep * longest(place) + wide[static_cast<size_t>(place + kSell8Rows / kSell8x16Rows)];
  int64_t best = 0, least = INT64_MAX, before = 0;  // before: what the narrow slices take
  for (int64_t narrow = 0; narrow <= n / kSell8x16Rows; ++narrow) {
    const int64_t cost = before + wide[static_cast<size_t>(narrow)];
    if (cost < least) {
      least = cost;
      best = narrow;
    }
    if (narrow < places) before += kNarrowStep * longest(narrow);
  }
  return best;
}

std::vector<uint8_t> pack_mixed(const Source& s) {
  std::vector<int64_t> count;
  const int64_t nonzeros = count_rows(s, &count);
  const std::vector<uint32_t> order = descending(count);
  std::sort(count.begin(), count.end(), std::greater<>());
  const int64_t narrow_slices = choose_narrow(count), first = narrow_slices * kSell8x16Rows;
  const Slices narrow = make_slices<kSell8x16Rows, float>(s, order, 0, first);
  const Slices wide = make_slices<kSell8Rows, float>(s, order, first, s.n);
  const MixedLayout l(s.n, narrow_slices, static_cast<int64_t>(narrow.offset.back()),
                      static_cast<int64_t>(wide.offset.back()));
  std::vector<uint8_t> out = begin_pack(kSell8x16Format, s, nonzeros, l.end);
  std::memcpy(out.data() + kPackHeaderBytes, &narrow_slices, 8);
  put(&out, put(&out, l.offset, narrow.offset), wide.offset);
  put(&out, put(&out, l.row, narrow.row), wide.row);
  put(&out, put(&out, l.base, narrow.base), wide.base);
  put(&out, put(&out, l.group, narrow.group), wide.group);
  return out;
}

std::string view_mixed(const PackHeader& h, const uint8_t* bytes, int64_t size, Pack* out) {
  const auto number = [&](int64_t at) {
    uint64_t value;
    std::memcpy(&value, bytes + at, 8);
    return value;
  };
  const auto too_short = [&](int64_t expected) {
    return "got " + std::to_string(size) + " bytes, expected at least " + std::to_string(expected);
  };
  if (size < kPackHeaderBytes + 8) return too_short(kPackHeaderBytes + 8);
  const uint64_t narrow = number(kPackHeaderBytes);
  if (narrow > static_cast<uint64_t>(h.n / kSell8x16Rows))
    return "got a damaged table: " + std::to_string(narrow) + " narrow slices";
  const MixedLayout empty(h.n, static_cast<int64_t>(narrow), 0, 0);
  if (empty.end > size) return too_short(empty.end);
  // The numbers of groups stand behind the last slices.
  const uint64_t narrow_groups = number(empty.offset + 8 * empty.narrow);
  const uint64_t wide_groups = number(empty.offset + 8 * (empty.narrow + 1 + empty.wide));
  for (const uint64_t groups : {narrow_groups, wide_groups})
    if (groups > static_cast<uint64_t>(size)) return "got a damaged table: " + std::to_string(groups) + " groups";
  const MixedLayout l(h.n, empty.narrow, static_cast<int64_t>(narrow_groups), static_cast<int64_t>(wide_groups));
  const std::string error = size_error(h, size, l.end);
  if (!error.empty()) return error;
  *out = {};
  out->format = kSell8;
  out->block = h.block;
  out->n = h.n;
  out->k = h.k;
  out->narrow = l.narrow;
  out->narrow_total = static_cast<int64_t>(narrow_groups);
  out->total = static_cast<int64_t>(narrow_groups + wide_groups);
  out->offset = reinterpret_cast<const uint64_t*>(bytes + l.offset);
  out->row = reinterpret_cast<const uint32_t*>(bytes + l.row);
  out->base = reinterpret_cast<const uint16_t*>(bytes + l.base);
  out->group = bytes + l.group;
  return "";
}

std::string damage_mixed(const PackHeader& h, const Pack& p, const uint8_t* bytes) {
  const MixedLayout l(p.n, p.narrow, p.narrow_total, p.total - p.narrow_total);
  const int64_t first = l.narrow * kSell8x16Rows;
  std::vector<int64_t> counts;
  std::string error = slices_damage<kSell8x16Rows, float>(narrow_slices(p), first, &counts);
  if (error.empty()) error = slices_damage<kSell8Rows, float>(wide_slices(p), p.n - first, &counts);
  if (error.empty()) error = rows_damage(p, first + l.wide * kSell8Rows, counts, h.nonzeros);
  if (!error.empty()) return error;
  if (choose_narrow(counts) != l.narrow) return damaged("slices of other widths than the format says");
  if (!all_zero(bytes + l.offset + 8 * (l.narrow + l.wide + 2), bytes + l.row) ||
      !all_zero(bytes + l.base + 2 * kSell8Steps * p.total, bytes + l.group))
    return damaged(kGap);
  return "";
}

void unpack_mixed(const Pack& p, float* weight) {
  unpack_slices<kSell8x16Rows, float>(narrow_slices(p), p.narrow, weight);
  unpack_slices<kSell8Rows, float>(wide_slices(p), ceil_div(p.n - p.narrow * kSell8x16Rows, kSell8Rows), weight);
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
const PackedFormat kSell8x16Format{kSell8,      "sell8x16",  kSell8x16Rows, kMaxSellK,
                                   &pack_mixed, &view_mixed, &damage_mixed, &unpack_mixed};
const PackedFormat kSell8Bf16 = make<kSell8Rows, uint16_t>("sell8");
const PackedFormat kSell8x32Bf16 = make<kSell8x32Rows, uint16_t>("sell8x32");

}  // namespace fs::sparse_matmul::formats
