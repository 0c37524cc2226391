#include "vnni16.h"

#include <cstring>

namespace fs::vnni16 {

namespace {

// One cell: 16 columns x 4 k, or what is left of them; the values are added to the sums of their columns.
inline void pack_cell(const int8_t* weight, int64_t stride_n, int64_t stride_k, int64_t columns, int64_t depth,
                      int8_t* cell, int32_t* sums) {
  for (int64_t j = 0; j < columns; ++j) {
    int32_t sum = 0;
    for (int64_t i = 0; i < depth; ++i) {
      const int8_t value = weight[j * stride_n + i * stride_k];
      cell[j * 4 + i] = value;
      sum += value;
    }
    sums[j] += sum;
  }
}

// A whole cell whose columns lie side by side: four rows interleaved, in the form that the compiler makes unpacks of.
inline void interleave_cell(const int8_t* weight, int64_t stride_k, int8_t* cell, int32_t* sums) {
  const int8_t *r0 = weight, *r1 = r0 + stride_k, *r2 = r1 + stride_k, *r3 = r2 + stride_k;
  int8_t out[64];
  for (int j = 0; j < 16; ++j) {
    out[4 * j] = r0[j];
    out[4 * j + 1] = r1[j];
    out[4 * j + 2] = r2[j];
    out[4 * j + 3] = r3[j];
  }
  std::memcpy(cell, out, 64);
  for (int j = 0; j < 16; ++j) sums[j] += r0[j] + r1[j] + r2[j] + r3[j];
}

// kContiguousN, kContiguousK say which stride is 1, so that the compiler sees it; whole cells have constant sides.
template <bool kContiguousN, bool kContiguousK>
void pack_cells(const int8_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k, int8_t* out,
                int32_t* sums) {
  if (kContiguousN) stride_n = 1;
  if (kContiguousK) stride_k = 1;
  // Columns side by side share cache lines: four panels take their part of a line before the next line comes.
  constexpr int64_t kBlock = kContiguousN ? 64 : 16;
  const int64_t steps = padded_k(k) / 4;
  for (int64_t block = 0; block < n; block += kBlock) {
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t depth = k - step * 4 < 4 ? k - step * 4 : 4;
      for (int64_t n0 = block; n0 < block + kBlock && n0 < n; n0 += 16) {
        const int64_t columns = n - n0 < 16 ? n - n0 : 16;
        const int8_t* source = weight + n0 * stride_n + step * 4 * stride_k;
        int8_t* cell = out + (n0 / 16 * steps + step) * 64;
        if (columns == 16 && depth == 4 && kContiguousN)
          interleave_cell(source, stride_k, cell, sums + n0);
        else if (columns == 16 && depth == 4)
          pack_cell(source, stride_n, stride_k, 16, 4, cell, sums + n0);
        else
          pack_cell(source, stride_n, stride_k, columns, depth, cell, sums + n0);
      }
    }
  }
}

}  // namespace

void pack(const int8_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k, uint8_t* pack) {
  std::memset(pack, 0, static_cast<size_t>(pack_bytes(n, k)));
  auto* out = reinterpret_cast<int8_t*>(pack + kHeaderBytes);
  auto* sums = reinterpret_cast<int32_t*>(pack + kHeaderBytes + weight_bytes(n, k));
  if (stride_k == 1)
    pack_cells<false, true>(weight, stride_n, stride_k, n, k, out, sums);
  else if (stride_n == 1)
    pack_cells<true, false>(weight, stride_n, stride_k, n, k, out, sums);
  else
    pack_cells<false, false>(weight, stride_n, stride_k, n, k, out, sums);
  const int64_t bytes = weight_bytes(n, k);
  int64_t zeros = 0;
  for (int64_t i = 0; i < bytes; ++i) zeros += out[i] == 0;
  const int64_t nonzeros = bytes - zeros;  // padding is zero
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
  if (std::memcmp(h.magic, "fspk", 4) != 0)
    return "got bytes that do not begin with \"fspk\"; make one with ops.pack()";
  if (h.format != kFormat) return "got format " + std::to_string(h.format) + ", expected 1 (vnni16)";
  if (h.version != kVersion)
    return "got vnni16 version " + std::to_string(h.version) + ", this build reads version " + std::to_string(kVersion);
  if (h.dtype != kDTypeS8 || h.block != 16)
    return "got dtype code " + std::to_string(h.dtype) + " and block " + std::to_string(h.block) +
           ", expected 1 and 16";
  if (n < 0 || k < 0 || n >= kLargestSide || k >= kLargestSide)
    return "asked for [N=" + std::to_string(n) + ", K=" + std::to_string(k) + "], each must be in [0, 2^31)";
  if (h.n != n || h.k != k)
    return "got a pack of [N=" + std::to_string(h.n) + ", K=" + std::to_string(h.k) +
           "], expected [N=" + std::to_string(n) + ", K=" + std::to_string(k) + "]";
  const int64_t expected = pack_bytes(n, k);
  if (bytes != expected || h.bytes != static_cast<uint64_t>(expected))
    return "got " + std::to_string(bytes) + " bytes (the header says " + std::to_string(h.bytes) + "), expected " +
           std::to_string(expected);
  if (h.nonzeros < 0 || h.nonzeros > n * k) return "got a damaged header: " + std::to_string(h.nonzeros) + " non-zeros";
  for (uint8_t byte : h.zero)
    if (byte != 0) return "got a damaged header: reserved bytes that are not zero";
  return "";
}

int64_t packed_k(const uint8_t* pack, int64_t bytes, int64_t n) {
  if (bytes < kHeaderBytes) return -1;
  PackHeader h;
  std::memcpy(&h, pack, sizeof h);
  return header_error(pack, bytes, n, h.k).empty() ? h.k : -1;
}

}  // namespace fs::vnni16
