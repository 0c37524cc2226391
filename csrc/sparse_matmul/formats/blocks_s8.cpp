#include "blocks_s8.h"

#include <algorithm>
#include <numeric>

#include "header_s8.h"

namespace fs::sparse_matmul::blocks_s8 {
namespace {

using int8::Blocks;
using int8::kGroups;
using int8::kOutputs;
using int8::kTileK;

// Where the sections begin.
struct Layout {
  int64_t offset, order, index, value, sum, bytes;
  Layout(const Blocks& shape) {
    offset = kPackHeaderBytes;
    order = offset + round_to_64(8 * (shape.chunks() + 1));
    index = order + round_to_64(2 * shape.units() * shape.chunks() * shape.k_blocks());
    value = index + round_to_64(shape.total + int8::kRoom);
    sum = value + round_to_64(4 * shape.rows * shape.total + int8::kRoom);
    bytes = sum + 4 * kOutputs * shape.chunks();
  }
};

Blocks shape_of(int64_t n, int64_t k, int64_t rows, int64_t total) {
  return {n, k, rows, total, nullptr, nullptr, nullptr, nullptr, nullptr};
}

// The block of `rows` outputs from `row` on and 4 k from 4 * group on; false if it is all zero.
bool read_block(const int8_t* weight, int64_t stride_n, int64_t stride_k, const Blocks& shape, int64_t row,
                int64_t group, int8_t* out) {
  bool any = false;
  for (int64_t r = 0; r < shape.rows; ++r)
    for (int64_t i = 0; i < kTileK; ++i) {
      const int64_t j = row + r, k = group * kTileK + i;
      const int8_t w = j < shape.n && k < shape.k ? weight[j * stride_n + k * stride_k] : int8_t{0};
      out[r * kTileK + i] = w;
      any |= w != 0;
    }
  return any;
}

}  // namespace

std::vector<uint8_t> pack(const int8_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k,
                          int64_t rows) {
  Blocks shape = shape_of(n, k, rows, 0);
  const int64_t units = shape.units();
  // First by unit, as they come; then the counts give the order.
  std::vector<uint8_t> order, index;
  std::vector<int8_t> value;
  std::vector<uint64_t> offset;
  int64_t nonzeros = 0;
  for (int64_t chunk = 0; chunk < shape.chunks(); ++chunk) {
    offset.push_back(index.size());
    for (int64_t block = 0; block < shape.k_blocks(); ++block) {
      std::vector<std::vector<uint8_t>> groups(static_cast<size_t>(units));
      std::vector<std::vector<int8_t>> values(static_cast<size_t>(units));
      const int64_t end = std::min(kGroups, shape.groups() - block * kGroups);
      for (int64_t u = 0; u < units && chunk * kOutputs + u * rows < n; ++u)
        for (int64_t g = 0; g < end; ++g) {
          int8_t w[16];
          if (!read_block(weight, stride_n, stride_k, shape, chunk * kOutputs + u * rows, block * kGroups + g, w))
            continue;
          groups[static_cast<size_t>(u)].push_back(static_cast<uint8_t>(g));
          auto& of_unit = values[static_cast<size_t>(u)];
          of_unit.insert(of_unit.end(), w, w + rows * kTileK);
        }
      std::vector<size_t> by_count(static_cast<size_t>(units));
      std::iota(by_count.begin(), by_count.end(), size_t{0});
      std::stable_sort(by_count.begin(), by_count.end(),
                       [&](size_t a, size_t b) { return groups[a].size() > groups[b].size(); });
      for (size_t u : by_count) order.push_back(static_cast<uint8_t>(u));
      for (size_t u : by_count) order.push_back(static_cast<uint8_t>(groups[u].size()));
      for (size_t u : by_count) {
        index.insert(index.end(), groups[u].begin(), groups[u].end());
        value.insert(value.end(), values[u].begin(), values[u].end());
      }
    }
  }
  offset.push_back(index.size());
  for (int8_t w : value) nonzeros += w != 0;
  shape.total = static_cast<int64_t>(index.size());
  const Layout at(shape);
  std::vector<uint8_t> out(static_cast<size_t>(at.bytes));
  const PackHeader header = s8_header(kFormat, block_code(rows), n, k, nonzeros, out.size());
  std::memcpy(out.data(), &header, sizeof header);
  const auto put = [&](int64_t place, const void* from, size_t bytes) {
    if (bytes > 0) std::memcpy(out.data() + place, from, bytes);
  };
  put(at.offset, offset.data(), offset.size() * 8);
  put(at.order, order.data(), order.size());
  put(at.index, index.data(), index.size());
  put(at.value, value.data(), value.size());
  auto* sum = reinterpret_cast<int32_t*>(out.data() + at.sum);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i) sum[row] += weight[row * stride_n + i * stride_k];
  return out;
}

std::string view(const PackHeader& h, const uint8_t* bytes, int64_t size, Blocks* out) {
  const auto known = [&](int64_t rows) { return h.block == block_code(rows); };
  if (!std::any_of(std::begin(int8::kBlockRows), std::end(int8::kBlockRows), known))
    return "got block " + std::to_string(h.block) + ", expected 260 (1x4) or 1028 (4x4) for blocks_s8";
  std::string error = s8_header_error(h);
  if (!error.empty()) return error;
  Blocks shape = shape_of(h.n, h.k, h.block / 256, 0);
  // Without a stored block first: the tables alone must be there before the number of blocks is read from them.
  const int64_t least = Layout(shape).bytes, total_at = kPackHeaderBytes + 8 * shape.chunks();
  if (size < least) return s8_size_error(h, size, least);
  uint64_t total;
  std::memcpy(&total, bytes + total_at, 8);
  const auto most = static_cast<uint64_t>(shape.chunks() * shape.units() * shape.groups());
  if (total > most) return "got a damaged pack: " + std::to_string(total) + " blocks, more than there are";
  shape.total = static_cast<int64_t>(total);
  const Layout at(shape);
  error = s8_size_error(h, size, at.bytes);
  if (!error.empty()) return error;
  shape.offset = reinterpret_cast<const uint64_t*>(bytes + at.offset);
  shape.order = bytes + at.order;
  shape.index = bytes + at.index;
  shape.value = reinterpret_cast<const int8_t*>(bytes + at.value);
  shape.sum = reinterpret_cast<const int32_t*>(bytes + at.sum);
  *out = shape;
  return "";
}

std::string validate(const PackHeader& h, const uint8_t* bytes, int64_t size, Blocks* out) {
  const std::string error = view(h, bytes, size, out);
  if (!error.empty()) return error;
  // There is one way to pack a weight, so packing again shows every byte that is not as it should be.
  std::vector<int8_t> weight(static_cast<size_t>(h.n * h.k));
  unpack(*out, weight.data());
  const std::vector<uint8_t> again = pack(weight.data(), h.k, 1, h.n, h.k, out->rows);
  if (!std::equal(again.begin(), again.end(), bytes, bytes + size))
    return "got a damaged pack: offsets, orders, indices, values and sums that do not fit each other or the header";
  return "";
}

void unpack(const Blocks& p, int8_t* weight) {
  if (p.n > 0 && p.k > 0) std::memset(weight, 0, static_cast<size_t>(p.n * p.k));
  const uint8_t* order = p.order;
  for (int64_t chunk = 0; chunk < p.chunks(); ++chunk) {
    auto position = static_cast<int64_t>(std::min<uint64_t>(p.offset[chunk], static_cast<uint64_t>(p.total)));
    for (int64_t block = 0; block < p.k_blocks(); ++block, order += 2 * p.units())
      for (int64_t u = 0; u < p.units(); ++u)
        for (int64_t left = order[p.units() + u]; left > 0 && position < p.total; --left, ++position)
          for (int64_t i = 0; i < p.rows * kTileK; ++i) {
            const int64_t row = chunk * kOutputs + order[u] * p.rows + i / kTileK;
            const int64_t k = (block * kGroups + p.index[position]) * kTileK + i % kTileK;
            if (row < p.n && k < p.k) weight[row * p.k + k] = p.value[position * p.rows * kTileK + i];
          }
  }
}

}  // namespace fs::sparse_matmul::blocks_s8
