#include "blocks.h"

#include <cstring>

namespace fs::sparse_matmul::formats {
namespace {

constexpr int64_t kOutputs = 16;  // of a slice

// Where each section begins.
struct Layout {
  int64_t slices, blocks, offset, order, count, index, value, end;
  Layout(int64_t n, int64_t k, int64_t steps, int64_t height, int64_t width)
      : slices(ceil_div(n, kOutputs)),
        blocks(ceil_div(k, kTileK)),
        offset(kPackHeaderBytes),
        order(offset + round64(8 * (slices + 1))),
        count(order + round64(slices * (kOutputs / height))),
        index(count + round64(slices * blocks * (kOutputs / height))),
        value(index + round64(2 * steps * (kOutputs / height))),
        end(value + 4 * kOutputs * width * steps) {}
};

// The first k of the blocks of R outputs from `row` on in which anything is not zero.
template <int64_t kR, int64_t kC>
std::vector<uint16_t> find_blocks(const Source& s, int64_t row) {
  std::vector<uint8_t> used(static_cast<size_t>(ceil_div(s.k, kC)));
  for (int64_t r = row; r < std::min(row + kR, s.n); ++r)
    for (int64_t k = 0; k < s.k; ++k) used[static_cast<size_t>(k / kC)] |= s.at(r, k) != 0.0f;
  std::vector<uint16_t> found;
  for (size_t b = 0; b < used.size(); ++b)
    if (used[b] != 0) found.push_back(static_cast<uint16_t>(b * kC));
  return found;
}

template <int64_t kR, int64_t kC>
void write_block(const Source& s, int64_t row, int64_t k, float* value) {
  for (int64_t r = 0; r < kR && row + r < s.n; ++r)
    for (int64_t c = 0; c < kC && k + c < s.k; ++c) {
      const float w = s.at(row + r, k + c);
      value[c * kOutputs + r] = w == 0.0f ? 0.0f : w;  // no -0
    }
}

template <int64_t kR, int64_t kC>
const PackedFormat& format_of();

template <int64_t kR, int64_t kC>
std::vector<uint8_t> pack(const Source& s) {
  constexpr int64_t kGroups = kOutputs / kR;
  const int64_t slices = ceil_div(s.n, kOutputs);
  const auto chunk = static_cast<size_t>(tile_width(s.n) / kR);                     // rows of blocks
  std::vector<std::vector<uint16_t>> found(static_cast<size_t>(slices * kGroups));  // of each row of blocks
  for (size_t g = 0; g < found.size(); ++g) found[g] = find_blocks<kR, kC>(s, static_cast<int64_t>(g) * kR);
  std::vector<size_t> row;  // of each place
  for (size_t first = 0; first < found.size(); first += chunk) {
    std::vector<int64_t> count;
    for (size_t g = first; g < std::min(first + chunk, found.size()); ++g)
      count.push_back(static_cast<int64_t>(found[g].size()));
    for (const uint32_t g : descending(count)) row.push_back(first + g);
  }
  int64_t steps = 0;
  for (size_t place = 0; place < row.size(); place += kGroups) steps += static_cast<int64_t>(found[row[place]].size());

  const Layout l(s.n, s.k, steps, kR, kC);
  std::vector<uint8_t> out = begin_pack(format_of<kR, kC>(), s, s.nonzeros(), l.end);
  auto* offset = reinterpret_cast<uint64_t*>(out.data() + l.offset);
  auto* index = reinterpret_cast<uint16_t*>(out.data() + l.index);
  auto* value = reinterpret_cast<float*>(out.data() + l.value);
  uint8_t *order = out.data() + l.order, *count = out.data() + l.count;
  int64_t step = 0;
  for (int64_t slice = 0; slice < slices; ++slice) {
    offset[slice] = static_cast<uint64_t>(step);
    for (int64_t g = 0; g < kGroups; ++g) {
      const size_t r = row[static_cast<size_t>(slice * kGroups + g)];
      order[slice * kGroups + g] = static_cast<uint8_t>(r % chunk);
      int64_t at = step;
      for (const uint16_t k : found[r]) {
        ++count[(slice * l.blocks + k / kTileK) * kGroups + g];
        index[at * kGroups + g] = k;
        write_block<kR, kC>(s, static_cast<int64_t>(r) * kR, k, value + at * kC * kOutputs + g * kR);
        ++at;
      }
    }
    step += static_cast<int64_t>(found[row[static_cast<size_t>(slice * kGroups)]].size());
  }
  offset[slices] = static_cast<uint64_t>(step);
  return out;
}

template <int64_t kR, int64_t kC>
std::string view(const PackHeader& h, const uint8_t* bytes, int64_t size, Pack* out) {
  const Layout empty(h.n, h.k, 0, kR, kC);
  if (empty.end > size) return "got " + std::to_string(size) + " bytes, expected at least " + std::to_string(empty.end);
  uint64_t steps;  // their number stands behind the last slice
  std::memcpy(&steps, bytes + empty.offset + 8 * empty.slices, 8);
  if (steps > static_cast<uint64_t>(size)) return "got a damaged table: " + std::to_string(steps) + " steps";
  const Layout l(h.n, h.k, static_cast<int64_t>(steps), kR, kC);
  const std::string error = size_error(h, size, l.end);
  if (!error.empty()) return error;
  *out = {};
  out->format = kBlocks;
  out->block = h.block;
  out->n = h.n;
  out->k = h.k;
  out->total = static_cast<int64_t>(steps);
  out->offset = reinterpret_cast<const uint64_t*>(bytes + l.offset);
  out->order = bytes + l.order;
  out->count = bytes + l.count;
  out->first_k = reinterpret_cast<const uint16_t*>(bytes + l.index);
  out->value = reinterpret_cast<const float*>(bytes + l.value);
  return "";
}

// Of any bytes that view() took: what lies outside is passed over.
template <int64_t kR, int64_t kC>
void unpack(const Pack& p, float* weight) {
  constexpr int64_t kGroups = kOutputs / kR;
  const int64_t blocks = ceil_div(p.k, kTileK), chunk = tile_width(p.n);
  const auto limit = static_cast<uint64_t>(p.total);
  for (int64_t slice = 0; slice < ceil_div(p.n, kOutputs); ++slice)
    for (int64_t g = 0; g < kGroups; ++g) {
      const int64_t row = slice / (chunk / kOutputs) * chunk + p.order[slice * kGroups + g] * kR;
      uint64_t left = 0, step = std::min(p.offset[slice], limit);
      for (int64_t b = 0; b < blocks; ++b) left += p.count[(slice * blocks + b) * kGroups + g];
      left = std::min(left, limit - step);
      for (; left > 0; --left, ++step) {
        const auto at = static_cast<int64_t>(step);
        const int64_t first = p.first_k[at * kGroups + g];
        for (int64_t r = 0; r < kR && row + r < p.n; ++r)
          for (int64_t c = 0; c < kC && first + c < p.k; ++c)
            weight[(row + r) * p.k + first + c] = p.value[(at * kC + c) * kOutputs + g * kR + r];
      }
    }
}

template <int64_t kR, int64_t kC>
const PackedFormat& format_of() {
  if constexpr (kR == 1) return kBlocks1x4;
  if constexpr (kR == 4) return kBlocks4x4;
  if constexpr (kR == 8) return kBlocks8x8;
  return kC == 16 ? kBlocks16x16 : kBlocks16x1;
}

template <int64_t kR, int64_t kC>
constexpr PackedFormat make(const char* name) {
  return {kBlocks,        name, 256 * kR + kC, kMaxSellK, &pack<kR, kC>, &view<kR, kC>, &differs_from_its_repack,
          &unpack<kR, kC>};
}

}  // namespace

const PackedFormat kBlocks1x4 = make<1, 4>("blocks1x4");
const PackedFormat kBlocks4x4 = make<4, 4>("blocks4x4");
const PackedFormat kBlocks8x8 = make<8, 8>("blocks8x8");
const PackedFormat kBlocks16x16 = make<16, 16>("blocks16x16");
const PackedFormat kBlocks16x1 = make<16, 1>("blocks16x1");

}  // namespace fs::sparse_matmul::formats
