#include "blocks16.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace fs::sparse_matmul::blocks16 {
namespace {

constexpr uint32_t kF16 = 3, kBf16 = 4;  // dtypes of the header

bool is_zero(uint16_t bits) { return (bits & 0x7fff) == 0; }

constexpr int64_t up64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Where the sections begin.
struct Layout {
  int64_t order, offset, column, value, end;
};
Layout layout(int64_t n, int64_t block, int64_t stored) {
  const int64_t rows = squares(n, block);
  Layout l{};
  l.order = kPackHeaderBytes;
  l.offset = l.order + up64(4 * rows);
  l.column = l.offset + up64(4 * (rows + 1));
  l.value = l.column + up64(4 * stored);
  l.end = l.value + 2 * block * block * stored;
  return l;
}

Weight pointers(const uint8_t* bytes, int64_t n, int64_t k, DType dtype, int block, int64_t stored) {
  const Layout l = layout(n, block, stored);
  return {n,
          k,
          dtype,
          block,
          stored,
          reinterpret_cast<const uint32_t*>(bytes + l.order),
          reinterpret_cast<const uint32_t*>(bytes + l.offset),
          reinterpret_cast<const uint32_t*>(bytes + l.column),
          reinterpret_cast<const uint16_t*>(bytes + l.value)};
}

// For which columns of squares each row of them stores one.
using Rows = std::vector<std::vector<uint32_t>>;

int64_t count(const Rows& rows) {
  int64_t found = 0;
  for (const auto& row : rows) found += static_cast<int64_t>(row.size());
  return found;
}

// Which squares of twice the size store anything; `rows` is of squares of kFine.
Rows coarsened(const Rows& rows) {
  Rows out((rows.size() + 1) / 2);
  for (size_t r = 0; r < rows.size(); r += 2) {
    std::vector<uint32_t>& row = out[r / 2];
    row = rows[r];
    if (r + 1 < rows.size()) row.insert(row.end(), rows[r + 1].begin(), rows[r + 1].end());
    for (uint32_t& column : row) column /= 2;
    std::sort(row.begin(), row.end());
    row.erase(std::unique(row.begin(), row.end()), row.end());
  }
  return out;
}

// Whether the squares are to be of kCoarse, by how many of either size there would be.
bool is_coarse(int64_t fine, int64_t coarse) {
  return coarse * kCoarse * kCoarse * kCoarser[1] <= fine * kFine * kFine * kCoarser[0];
}

std::vector<uint32_t> longest_first(const uint32_t* offset, int64_t rows) {
  std::vector<uint32_t> order(static_cast<size_t>(rows));
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return offset[a + 1] - offset[a] > offset[b + 1] - offset[b]; });
  return order;
}

}  // namespace

std::vector<uint8_t> pack(const uint16_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k,
                          DType dtype) {
  int64_t nonzeros = 0;
  Rows rows(static_cast<size_t>(squares(n, kFine)));
  std::vector<uint8_t> used(static_cast<size_t>(squares(k, kFine)));
  for (int64_t r = 0; r < squares(n, kFine); ++r) {
    std::fill(used.begin(), used.end(), uint8_t{0});
    for (int64_t row = r * kFine; row < std::min(n, (r + 1) * kFine); ++row)
      for (int64_t column = 0; column < k; ++column)
        if (!is_zero(weight[row * stride_n + column * stride_k])) {
          ++nonzeros;
          used[static_cast<size_t>(column / kFine)] = 1;
        }
    for (size_t c = 0; c < used.size(); ++c)
      if (used[c] != 0) rows[static_cast<size_t>(r)].push_back(static_cast<uint32_t>(c));
  }
  int block = kFine;
  Rows coarse = coarsened(rows);
  if (is_coarse(count(rows), count(coarse))) {
    block = kCoarse;
    rows = std::move(coarse);
  }
  const int64_t stored = count(rows);
  const Layout l = layout(n, block, stored);
  std::vector<uint8_t> out(static_cast<size_t>(l.end));
  auto* order = reinterpret_cast<uint32_t*>(out.data() + l.order);
  auto* offset = reinterpret_cast<uint32_t*>(out.data() + l.offset);
  auto* column = reinterpret_cast<uint32_t*>(out.data() + l.column);
  auto* value = reinterpret_cast<uint16_t*>(out.data() + l.value);
  uint32_t next = 0;
  for (int64_t r = 0; r < squares(n, block); ++r) {
    offset[r] = next;
    for (const uint32_t c : rows[static_cast<size_t>(r)]) {
      uint16_t* square = value + int64_t{next} * block * block;
      for (int64_t i = r * block; i < std::min(n, (r + 1) * block); ++i)
        for (int64_t j = int64_t{c} * block; j < std::min(k, (int64_t{c} + 1) * block); ++j) {
          const uint16_t bits = weight[i * stride_n + j * stride_k];
          if (!is_zero(bits)) square[i % block * block + j % block] = bits;
        }
      column[next++] = c;
    }
  }
  offset[squares(n, block)] = next;
  const std::vector<uint32_t> sorted = longest_first(offset, squares(n, block));
  std::copy(sorted.begin(), sorted.end(), order);
  PackHeader header{};
  std::memcpy(header.magic, "fspk", 4);
  header.format = kFormat;
  header.version = kVersion;
  header.dtype = dtype == DType::f16 ? kF16 : kBf16;
  header.block = static_cast<uint32_t>(block);
  header.n = n;
  header.k = k;
  header.nonzeros = nonzeros;
  header.bytes = out.size();
  std::memcpy(out.data(), &header, sizeof header);
  return out;
}

std::string view(const PackHeader& h, const uint8_t* bytes, int64_t size, Weight* out) {
  const auto text = [](auto number) { return std::to_string(number); };
  if (std::memcmp(h.magic, "fspk", 4) != 0)
    return "got bytes that do not begin with \"fspk\"; make one with ops.pack()";
  if (h.format != kFormat) return "got format " + text(h.format) + ", expected 14 (blocks16)";
  if (h.version != kVersion) return "got blocks16 version " + text(h.version) + ", this build reads version 1";
  if ((h.dtype != kF16 && h.dtype != kBf16) || (h.block != kFine && h.block != kCoarse))
    return "got dtype code " + text(h.dtype) + " and block " + text(h.block) + ", expected 3 or 4 and 32 or 64";
  const bool sides = h.n >= 0 && h.k >= 0 && h.n < kLargestSide && h.k < kLargestSide;
  if (!sides || h.nonzeros < 0 || h.nonzeros > h.n * h.k)
    return "got a damaged header: N=" + text(h.n) + ", K=" + text(h.k) + ", " + text(h.nonzeros) + " non-zeros";
  for (uint8_t byte : h.zero)
    if (byte != 0) return "got a damaged header: reserved bytes that are not zero";
  // The gap behind the columns is shorter than a square, so at most one number of squares has this size.
  const int64_t block = h.block, least = layout(h.n, block, 0).end;
  const int64_t stored = size < least ? 0 : (size - least) / (2 * block * block + 4);
  const int64_t expected = layout(h.n, block, stored).end;
  if (size != expected || h.bytes != static_cast<uint64_t>(size))
    return "got " + text(size) + " bytes (the header says " + text(h.bytes) + "), expected " + text(expected) +
           " for as many squares as they could hold";
  if (stored > squares(h.n, block) * squares(h.k, block)) return "got more squares than the weight has";
  *out = pointers(bytes, h.n, h.k, h.dtype == kF16 ? DType::f16 : DType::bf16, static_cast<int>(block), stored);
  return "";
}

std::string validate(const uint8_t* bytes, int64_t size, Weight* out) {
  if (size < kPackHeaderBytes) return "got " + std::to_string(size) + " bytes, a header alone has 64";
  PackHeader header;
  std::memcpy(&header, bytes, sizeof header);
  const std::string error = view(header, bytes, size, out);
  if (!error.empty()) return error;
  // There is one way to pack a weight: whatever is not as pack() writes it is damage. The weight itself may be far
  // larger than the pack, and is not made.
  const auto damaged = [](const char* what) { return std::string("got a damaged pack: ") + what; };
  const Weight& p = *out;
  const Layout l = layout(p.n, p.block, p.stored);
  const int64_t rows = squares(p.n, p.block), columns = squares(p.k, p.block);
  if (p.offset[0] != 0 || p.offset[rows] != p.stored) return damaged("offsets that do not span the squares");
  for (int64_t r = 0; r < rows; ++r) {
    if (p.offset[r] > p.offset[r + 1] || p.offset[r + 1] > p.stored) return damaged("offsets that do not ascend");
    for (uint32_t i = p.offset[r]; i < p.offset[r + 1]; ++i)
      if (p.column[i] >= columns || (i > p.offset[r] && p.column[i] <= p.column[i - 1]))
        return damaged("columns that do not ascend below K");
  }
  if (!std::equal(p.order, p.order + rows, longest_first(p.offset, rows).begin()))
    return damaged("rows that are not sorted");
  const auto all_zero = [&](const void* begin, int64_t end) {
    return std::all_of(static_cast<const uint8_t*>(begin), bytes + end, [](uint8_t byte) { return byte == 0; });
  };
  if (!all_zero(p.order + rows, l.offset) || !all_zero(p.offset + rows + 1, l.column) ||
      !all_zero(p.column + p.stored, l.value))
    return damaged("a gap that is not zero");
  int64_t nonzeros = 0, fine = 0, coarse = p.stored;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t s = p.offset[r]; s < p.offset[r + 1]; ++s) {
      int64_t of_part[2][2] = {};
      for (int64_t i = 0; i < p.block; ++i)
        for (int64_t j = 0; j < p.block; ++j) {
          const uint16_t bits = p.value[(s * p.block + i) * p.block + j];
          if (bits == 0) continue;
          if (is_zero(bits) || r * p.block + i >= p.n || int64_t{p.column[s]} * p.block + j >= p.k)
            return damaged("values that are not zero beyond N or K, or -0");
          ++of_part[i / kFine][j / kFine];
        }
      const int64_t before = nonzeros;
      for (const auto& pair : of_part)
        for (int64_t count : pair) {
          nonzeros += count;
          fine += count != 0;
        }
      if (nonzeros == before) return damaged("a square of zeros");
    }
  if (nonzeros != header.nonzeros) return damaged("values that do not match the header's non-zeros");
  if (p.block == kFine) {
    Rows stored_columns;
    for (int64_t r = 0; r < rows; ++r) stored_columns.emplace_back(p.column + p.offset[r], p.column + p.offset[r + 1]);
    coarse = count(coarsened(stored_columns));
  }
  if ((p.block == kCoarse) != is_coarse(fine, coarse)) return damaged("squares of the wrong size");
  return "";
}

void unpack(const Weight& p, uint16_t* weight) {
  if (p.n == 0 || p.k == 0) return;  // an empty tensor has no memory
  std::memset(weight, 0, static_cast<size_t>(p.n * p.k) * 2);
  const auto held = [&](int64_t r) { return std::min<int64_t>(p.offset[r], p.stored); };
  for (int64_t r = 0; r < squares(p.n, p.block); ++r)
    for (int64_t s = held(r); s < held(r + 1); ++s) {
      const int64_t k0 = int64_t{p.column[s]} * p.block;
      const uint16_t* square = p.value + s * p.block * p.block;
      for (int64_t i = 0; i < p.block && r * p.block + i < p.n; ++i)
        for (int64_t j = 0; j < p.block && k0 + j < p.k; ++j)
          weight[(r * p.block + i) * p.k + k0 + j] = square[i * p.block + j];
    }
}

}  // namespace fs::sparse_matmul::blocks16
