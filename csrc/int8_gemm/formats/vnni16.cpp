#include "vnni16.h"

#include <cstring>

namespace fs::vnni16 {

void pack(const int8_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k, uint8_t* pack) {
  const int64_t kp = padded_k(k), np = padded_n(n);
  std::memset(pack, 0, static_cast<size_t>(pack_bytes(n, k)));
  auto* out = reinterpret_cast<int8_t*>(pack + kHeaderBytes);
  auto* sums = reinterpret_cast<int32_t*>(pack + kHeaderBytes + weight_bytes(n, k));
  int64_t nonzeros = 0;
  for (int64_t panel = 0; panel < np / 16; ++panel) {
    for (int64_t step = 0; step < kp / 4; ++step) {
      int8_t* cell = out + (panel * (kp / 4) + step) * 64;
      for (int64_t j = 0; j < 16 && panel * 16 + j < n; ++j) {
        const int8_t* row = weight + (panel * 16 + j) * stride_n;
        for (int64_t i = 0; i < 4 && step * 4 + i < k; ++i) {
          const int8_t value = row[(step * 4 + i) * stride_k];
          cell[j * 4 + i] = value;
          sums[panel * 16 + j] += value;
          nonzeros += value != 0;
        }
      }
    }
  }
  PackHeader header{};
  std::memcpy(header.magic, "fspk", 4);
  header.format = kFormat;
  header.version = kVersion;
  header.dtype = kDTypeS8;
  header.block = 16;
  header.n = n;
  header.k = k;
  header.nonzeros = nonzeros;
  header.bytes = static_cast<uint64_t>(pack_bytes(n, k));
  std::memcpy(pack, &header, sizeof header);
}

void unpack(const uint8_t* pack, int64_t n, int64_t k, int8_t* weight) {
  const int8_t* in = weights(pack);
  const int64_t steps = padded_k(k) / 4;
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i)
      weight[row * k + i] = in[((row / 16) * steps + i / 4) * 64 + (row % 16) * 4 + i % 4];
}

std::string header_error(const uint8_t* pack, int64_t bytes, int64_t n, int64_t k) {
  if (bytes < kHeaderBytes) return "got " + std::to_string(bytes) + " bytes, a header alone has 64";
  PackHeader h;
  std::memcpy(&h, pack, sizeof h);
  if (std::memcmp(h.magic, "fspk", 4) != 0) return "got bytes that do not begin with \"fspk\"; make one with ops.pack()";
  if (h.format != kFormat) return "got format " + std::to_string(h.format) + ", expected 1 (vnni16)";
  if (h.version != kVersion)
    return "got vnni16 version " + std::to_string(h.version) + ", this build reads version " + std::to_string(kVersion);
  if (h.dtype != kDTypeS8 || h.block != 16)
    return "got dtype code " + std::to_string(h.dtype) + " and block " + std::to_string(h.block) + ", expected 1 and 16";
  if (n < 0 || k < 0 || n >= kLargestSide || k >= kLargestSide)
    return "asked for [N=" + std::to_string(n) + ", K=" + std::to_string(k) + "], each must be in [0, 2^31)";
  if (h.n != n || h.k != k)
    return "got a pack of [N=" + std::to_string(h.n) + ", K=" + std::to_string(h.k) + "], expected [N=" +
           std::to_string(n) + ", K=" + std::to_string(k) + "]";
  const int64_t expected = pack_bytes(n, k);
  if (bytes != expected || h.bytes != static_cast<uint64_t>(expected))
    return "got " + std::to_string(bytes) + " bytes (the header says " + std::to_string(h.bytes) + "), expected " +
           std::to_string(expected);
  if (h.nonzeros < 0 || h.nonzeros > n * k) return "got a damaged header: " + std::to_string(h.nonzeros) + " non-zeros";
  for (uint8_t byte : h.zero)
    if (byte != 0) return "got a damaged header: reserved bytes that are not zero";
  return "";
}

}  // namespace fs::vnni16
