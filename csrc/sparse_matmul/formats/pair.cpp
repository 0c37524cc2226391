#include "pair.h"

#include <cstring>

#include "sparse.h"

namespace fs::sparse_matmul::formats {
namespace {

PackHeader header_at(const uint8_t* bytes) {
  PackHeader h;
  std::memcpy(&h, bytes, sizeof h);
  return h;
}

// Empty if the header is sound and both packs have room for one; then where the second begins.
std::string header_error(const PackHeader& h, const uint8_t* bytes, int64_t size, int64_t* second) {
  const auto text = [](auto value) { return std::to_string(value); };
  if (h.version != kVersion) return "got pair version " + text(h.version) + ", this build reads version 1";
  const bool sides = h.n >= 0 && h.k >= 0 && h.n < kLargestSide && h.k < kLargestSide;
  if (h.dtype != kDTypeF32 || h.block < 1 || !sides || !all_zero(h.zero, h.zero + sizeof h.zero))
    return "got a damaged header: dtype " + text(h.dtype) + ", rows " + text(h.block) + ", N=" + text(h.n) +
           ", K=" + text(h.k);
  if (h.bytes != static_cast<uint64_t>(size)) return size_error(h, size, static_cast<int64_t>(h.bytes));
  if (size < 3 * kPackHeaderBytes || h.n * h.k > kPairWeightsPerByte * size)
    return "got " + text(size) + " bytes for a pair of N=" + text(h.n) + ", K=" + text(h.k);
  const uint64_t first = header_at(bytes + kPackHeaderBytes).bytes;
  if (first % 64 != 0 || first < static_cast<uint64_t>(kPackHeaderBytes) ||
      first > static_cast<uint64_t>(size - 2 * kPackHeaderBytes))
    return "got a pair whose first pack says that it has " + text(first) + " bytes";
  *second = kPackHeaderBytes + static_cast<int64_t>(first);
  return "";
}

// One of the two, from `begin` up to `end`.
std::string view_one(const PackHeader& h, const uint8_t* bytes, int64_t begin, int64_t end, Pack* out) {
  const PackHeader inner = header_at(bytes + begin);
  if (inner.format == kPair) return "got a pair inside a pair";
  if (inner.n != h.n || inner.k != h.k || inner.nonzeros != h.nonzeros)
    return "got a pair whose packs are not of one weight";
  return view(bytes + begin, end - begin, out);
}

}  // namespace

std::string view_pair(const PackHeader& h, const uint8_t* bytes, int64_t size, int64_t rows, Pack* out) {
  int64_t second = 0;
  const std::string error = header_error(h, bytes, size, &second);
  if (!error.empty()) return error;
  return rows <= h.block ? view_one(h, bytes, kPackHeaderBytes, second, out) : view_one(h, bytes, second, size, out);
}

std::string pair_damage(const PackHeader& h, const uint8_t* bytes, int64_t size) {
  int64_t second = 0;
  std::string error = header_error(h, bytes, size, &second);
  Pack one, two;
  if (error.empty()) error = view_one(h, bytes, kPackHeaderBytes, second, &one);
  if (error.empty()) error = view_one(h, bytes, second, size, &two);
  if (error.empty()) error = validate(bytes + kPackHeaderBytes, second - kPackHeaderBytes);
  if (error.empty()) error = validate(bytes + second, size - second);
  if (!error.empty()) return error;
  if (one.format == two.format && one.block == two.block) return damaged("a pair of one layout");
  const auto weights = static_cast<size_t>(h.n * h.k);
  std::vector<float> a(weights), b(weights);
  unpack(one, a.data());
  unpack(two, b.data());
  if (weights != 0 && std::memcmp(a.data(), b.data(), weights * sizeof(float)) != 0)
    return damaged("a pair whose packs are not of one weight");
  return "";
}

}  // namespace fs::sparse_matmul::formats
