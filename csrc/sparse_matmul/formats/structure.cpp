#include "structure.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "packed_format.h"
#include "panels128.h"
#include "sparse.h"

namespace fs::sparse_matmul::formats {
namespace {

constexpr uint16_t kStructureVersion = 1;

std::string text(int64_t value) { return std::to_string(value); }

// Where each section begins.
struct Layout {
  int64_t chunks, blocks, bytes, order, start, index, forward, transposed, end;
  Layout(int64_t n, int64_t k, int64_t nonzeros, int64_t forward_bytes, int64_t transposed_bytes)
      : chunks(ceil_div(n, kSampleOutputs)),
        blocks(ceil_div(k, kSampleColumns)),
        bytes(kPackHeaderBytes),
        order(bytes + 64),
        start(order + round64(2 * kSampleOutputs * chunks * blocks)),
        index(start + round64(4 * kSampleOutputs * chunks * blocks)),
        forward(index + round64(nonzeros + kSampleRoom)),
        transposed(forward + round64(forward_bytes)),
        end(transposed + round64(transposed_bytes)) {}
};

// panels128 of the matrix or, with `transposed`, of its transpose, with labels as values.
std::vector<uint8_t> labelled(const Csr& csr, bool transposed) {
  std::vector<float> dense(static_cast<size_t>(csr.n * csr.k));
  for (int64_t r = 0; r < csr.n; ++r)
    for (int64_t i = csr.crow[r]; i < csr.crow[r + 1]; ++i) {
      const uint32_t label = kFirstLabel + static_cast<uint32_t>(i);
      const int64_t at = transposed ? csr.col[i] * csr.n + r : r * csr.k + csr.col[i];
      std::memcpy(&dense[static_cast<size_t>(at)], &label, sizeof label);
    }
  const int64_t rows = transposed ? csr.k : csr.n, columns = transposed ? csr.n : csr.k;
  return pack(kPanels128Format, dense.data(), columns, 1, rows, columns);
}

// order, start and index, into zeros.
void fill_tables(const Csr& csr, uint8_t* out, const Layout& l) {
  uint8_t *order = out + l.order, *index = out + l.index;
  auto* start = reinterpret_cast<uint32_t*>(out + l.start);
  for (int64_t i = 0; i < csr.nonzeros; ++i) index[i] = static_cast<uint8_t>(csr.col[i] % kSampleColumns);
  std::vector<int64_t> next(kSampleOutputs), count(kSampleOutputs);
  for (int64_t chunk = 0; chunk < l.chunks; ++chunk) {
    const auto begin_of = [&](int64_t r) { return csr.crow[std::min(chunk * kSampleOutputs + r, csr.n)]; };
    for (int64_t r = 0; r < kSampleOutputs; ++r) next[static_cast<size_t>(r)] = begin_of(r);
    for (int64_t block = 0; block < l.blocks; ++block, order += 2 * kSampleOutputs, start += kSampleOutputs) {
      for (int64_t r = 0; r < kSampleOutputs; ++r) {
        const int64_t* const from = csr.col + next[static_cast<size_t>(r)];
        count[static_cast<size_t>(r)] =
            std::lower_bound(from, csr.col + begin_of(r + 1), (block + 1) * kSampleColumns) - from;
      }
      const std::vector<uint32_t> sorted = descending(count);
      for (int64_t at = 0; at < kSampleOutputs; ++at) {
        const uint32_t r = sorted[static_cast<size_t>(at)];
        order[at] = static_cast<uint8_t>(r);
        order[kSampleOutputs + at] = static_cast<uint8_t>(count[r]);
        if (count[r] != 0) start[at] = static_cast<uint32_t>(next[r]);
        next[r] += count[r];
      }
    }
  }
}

// One of the packs: empty if it is a panels128 pack of [n, k] with so many values.
std::string view_labelled(const uint8_t* bytes, int64_t size, int64_t n, int64_t k, int64_t nonzeros,
                          LabelledPack* out) {
  const std::string error = view(bytes, size, &out->pack);
  if (!error.empty()) return error;
  PackHeader h;
  std::memcpy(&h, bytes, sizeof h);
  if (h.format != kPanels128 || h.dtype != kDTypeF32 || h.n != n || h.k != k || h.nonzeros != nonzeros)
    return "got one of format " + text(h.format) + " [" + text(h.n) + ", " + text(h.k) + "], " + text(h.nonzeros) +
           " non-zeros";
  const auto* label = reinterpret_cast<const uint8_t*>(out->pack.value);
  out->label = reinterpret_cast<const uint32_t*>(label);
  out->floats = (bytes + size - label) / 4;
  out->pack.value = nullptr;
  return "";
}

}  // namespace

std::string check_csr(const Csr& csr) {
  if (csr.crow[0] != 0 || csr.crow[csr.n] != csr.nonzeros)
    return "crow must run from 0 to the number of columns=" + text(csr.nonzeros) + ", got " + text(csr.crow[0]) +
           " to " + text(csr.crow[csr.n]);
  for (int64_t r = 0; r < csr.n; ++r)  // all of it before any column is read: a bump would lead outside
    if (csr.crow[r + 1] < csr.crow[r])
      return "crow must not descend, got " + text(csr.crow[r]) + " before " + text(csr.crow[r + 1]) + " at row " +
             text(r);
  for (int64_t r = 0; r < csr.n; ++r) {
    int64_t last = -1;
    for (int64_t i = csr.crow[r]; i < csr.crow[r + 1]; ++i) {
      const int64_t c = csr.col[i];
      if (c < 0 || c >= csr.k)
        return "col must be in 0 .. K-1=" + text(csr.k - 1) + ", got " + text(c) + " in row " + text(r);
      if (c <= last)
        return std::string("the columns of a row must ") + (c == last ? "differ" : "ascend") + ", got " + text(last) +
               " before " + text(c) + " in row " + text(r);
      last = c;
    }
  }
  return "";
}

std::vector<uint8_t> pack_structure(const Csr& csr) {
  const std::vector<uint8_t> forward = labelled(csr, false), transposed = labelled(csr, true);
  const uint64_t bytes[2] = {forward.size(), transposed.size()};
  const Layout l(csr.n, csr.k, csr.nonzeros, static_cast<int64_t>(bytes[0]), static_cast<int64_t>(bytes[1]));
  std::vector<uint8_t> out(static_cast<size_t>(l.end));
  const PackHeader header = structure_header(csr.n, csr.k, csr.nonzeros, l.end);
  std::memcpy(out.data(), &header, sizeof header);
  std::memcpy(out.data() + l.bytes, bytes, sizeof bytes);
  fill_tables(csr, out.data(), l);
  std::copy(forward.begin(), forward.end(), out.begin() + l.forward);
  std::copy(transposed.begin(), transposed.end(), out.begin() + l.transposed);
  return out;
}

PackHeader structure_header(int64_t n, int64_t k, int64_t nonzeros, int64_t size) {
  PackHeader header{};
  std::memcpy(header.magic, "fspk", 4);
  header.format = kStructure;
  header.version = kStructureVersion;
  header.dtype = kDTypeF32;
  header.block = kSampleColumns;
  header.n = n;
  header.k = k;
  header.nonzeros = nonzeros;
  header.bytes = static_cast<uint64_t>(size);
  return header;
}

std::string view_tables(const PackHeader& h, const uint8_t* bytes, int64_t size, StructureView* out) {
  if (size < kPackHeaderBytes + 64) return "got " + text(size) + " bytes, its headers alone have 128";
  if (std::memcmp(h.magic, "fspk", 4) != 0)
    return "got bytes that do not begin with \"fspk\"; make one with ops.sparse_structure()";
  if (h.format != kStructure)
    return "got format " + text(h.format) + ", expected 15 (structure); make one with ops.sparse_structure()";
  if (h.version != kStructureVersion)
    return "got structure version " + text(h.version) + ", this build reads version 1";
  if (h.dtype != kDTypeF32 || h.block != kSampleColumns)
    return "got dtype code " + text(h.dtype) + " and block " + text(h.block) + ", expected 2 and 128";
  if (h.n < 0 || h.k < 0 || h.n >= kLargestSide || h.k >= kLargestSide)
    return "got a damaged header: N=" + text(h.n) + ", K=" + text(h.k);
  if (h.nonzeros < 0 || h.nonzeros > h.n * h.k || h.nonzeros > std::min(size, kMaxPlaces))
    return "got a damaged header: " + text(h.nonzeros) + " non-zeros";
  for (uint8_t byte : h.zero)
    if (byte != 0) return "got a damaged header: reserved bytes that are not zero";
  const Layout l(h.n, h.k, h.nonzeros, 0, 0);
  if (size < l.end || h.bytes != static_cast<uint64_t>(size))
    return "got " + text(size) + " bytes (the header says " + std::to_string(h.bytes) + "), expected " + text(l.end) +
           " and two packs";
  out->n = h.n;
  out->k = h.k;
  out->nonzeros = h.nonzeros;
  out->order = bytes + l.order;
  out->start = reinterpret_cast<const uint32_t*>(bytes + l.start);
  out->index = bytes + l.index;
  return "";
}

std::string view_structure(const uint8_t* bytes, int64_t size, StructureView* out) {
  PackHeader h{};
  std::memcpy(&h, bytes, static_cast<size_t>(std::min<int64_t>(size, sizeof h)));
  std::string error = view_tables(h, bytes, size, out);
  if (!error.empty()) return error;
  uint64_t packs[2];
  std::memcpy(packs, bytes + kPackHeaderBytes, sizeof packs);
  for (const uint64_t each : packs)
    if (each > static_cast<uint64_t>(size)) return "got a damaged header: a part of " + std::to_string(each) + " bytes";
  const Layout l(h.n, h.k, h.nonzeros, static_cast<int64_t>(packs[0]), static_cast<int64_t>(packs[1]));
  if (size != l.end) return "got " + text(size) + " bytes, expected " + text(l.end);
  error = view_labelled(bytes + l.forward, static_cast<int64_t>(packs[0]), h.n, h.k, h.nonzeros, &out->forward);
  if (error.empty())
    error = view_labelled(bytes + l.transposed, static_cast<int64_t>(packs[1]), h.k, h.n, h.nonzeros, &out->transposed);
  return error.empty() ? "" : "got a damaged part: " + error;
}

std::string read_structure(const uint8_t* bytes, int64_t size, std::vector<int64_t>* crow, std::vector<int64_t>* col) {
  StructureView s;
  const std::string error = view_structure(bytes, size, &s);
  if (!error.empty()) return error;
  // The indices that its tables say; then there is one way to pack these.
  const std::string damaged = "got a damaged structure: ";
  crow->assign(static_cast<size_t>(s.n + 1), 0);
  col->assign(static_cast<size_t>(s.nonzeros), 0);
  const int64_t blocks = ceil_div(s.k, kSampleColumns), units = ceil_div(s.n, kSampleOutputs) * blocks;
  const auto each = [&](auto&& row) {  // false as soon as row() is
    for (int64_t unit = 0; unit < units; ++unit)
      for (int64_t at = 0; at < kSampleOutputs; ++at) {
        const uint8_t* order = s.order + unit * 2 * kSampleOutputs;
        const int64_t count = order[kSampleOutputs + at];
        if (count != 0 && !row(unit / blocks * kSampleOutputs + order[at], unit % blocks * kSampleColumns, count))
          return false;
      }
    return true;
  };
  int64_t total = 0;
  const bool rows_fit = each([&](int64_t r, int64_t, int64_t count) {
    if (r >= s.n) return false;
    (*crow)[static_cast<size_t>(r + 1)] += count;
    return (total += count) <= s.nonzeros;
  });
  if (!rows_fit || total != s.nonzeros) return damaged + "counts that do not match its non-zeros";
  std::partial_sum(crow->begin(), crow->end(), crow->begin());
  std::vector<int64_t> next(crow->begin(), crow->end() - 1);
  each([&](int64_t r, int64_t base, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = next[static_cast<size_t>(r)]++;
      (*col)[static_cast<size_t>(place)] = base + s.index[place];
    }
    return true;
  });
  const Csr csr{crow->data(), col->data(), s.n, s.k, s.nonzeros};
  const std::string wrong = check_csr(csr);
  if (!wrong.empty()) return damaged + wrong;
  const std::vector<uint8_t> packed = pack_structure(csr);
  if (static_cast<int64_t>(packed.size()) != size || std::memcmp(packed.data(), bytes, packed.size()) != 0)
    return damaged + "its tables do not agree with one another";
  return "";
}

}  // namespace fs::sparse_matmul::formats
