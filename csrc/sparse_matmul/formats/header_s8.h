// What the two int8 formats check of a header alike.
#pragma once
#include <cstring>
#include <string>

#include "../../runtime/pack.h"
#include "../int8.h"

namespace fs::sparse_matmul {

inline int64_t round_to_64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

inline PackHeader s8_header(uint16_t format, uint32_t block, int64_t n, int64_t k, int64_t nonzeros, uint64_t bytes) {
  PackHeader header{};
  std::memcpy(header.magic, "fspk", 4);
  header.format = format;
  header.version = 1;
  header.dtype = 1;
  header.block = block;
  header.n = n;
  header.k = k;
  header.nonzeros = nonzeros;
  header.bytes = bytes;
  return header;
}

// Version, dtype, sides, non-zeros and reserved bytes of a header whose magic and format are known to be right.
inline std::string s8_header_error(const PackHeader& h) {
  const auto text = [](auto number) { return std::to_string(number); };
  if (h.version != 1) return "got version " + text(h.version) + " of its format, this build reads version 1";
  if (h.dtype != 1) return "got dtype code " + text(h.dtype) + ", expected 1";
  // N * K < 2^31 * 2^17: no size below can overflow.
  const bool sides = h.n >= 0 && h.k >= 0 && h.n < kLargestSide && h.k <= int8::kMaxK;
  if (!sides || h.nonzeros < 0 || h.nonzeros > h.n * h.k)
    return "got a damaged header: N=" + text(h.n) + ", K=" + text(h.k) + ", " + text(h.nonzeros) + " non-zeros";
  for (uint8_t byte : h.zero)
    if (byte != 0) return "got a damaged header: reserved bytes that are not zero";
  return "";
}

inline std::string s8_size_error(const PackHeader& h, int64_t size, int64_t expected) {
  if (size == expected && h.bytes == static_cast<uint64_t>(expected)) return "";
  return "got " + std::to_string(size) + " bytes (the header says " + std::to_string(h.bytes) + "), expected " +
         std::to_string(expected);
}

}  // namespace fs::sparse_matmul
