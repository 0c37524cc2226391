#include "nm24.h"

#include <algorithm>
#include <cstring>

namespace fs::sparse_matmul::nm24 {
namespace {

constexpr uint32_t kF16 = 3, kBf16 = 4;  // dtypes of the header

// Where the 4 bits of (row, k 4 * group ..) stand.
struct Place {
  int64_t word;
  int shift;
};
Place place(int64_t row, int64_t group, int64_t kp) {
  const int64_t block = row / kRows * (kp / kColumns) + group / (kColumns / 4);
  const int64_t in_block = row % 8 * 4 + group / 4 % 4;
  return {block * 32 + in_block, static_cast<int>(16 * (row % kRows / 8) + 4 * (group % 4))};
}

bool is_zero(uint16_t bits) { return (bits & 0x7fff) == 0; }

// The two of four to keep, the lower one first.
void choose(const uint16_t (&four)[4], int (&kept)[2]) {
  bool keep[4];
  int count = 0;
  for (int i = 0; i < 4; ++i) count += keep[i] = !is_zero(four[i]);
  for (int i = 0; count < 2; ++i)
    if (!keep[i]) {
      keep[i] = true;
      ++count;
    }
  int found = 0;
  for (int i = 0; i < 4; ++i)
    if (keep[i]) kept[found++] = i;
}

}  // namespace

std::vector<uint8_t> pack(const uint16_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k, DType dtype,
                          NotSparse* where) {
  const int64_t np = padded_n(n), kp = padded_k(k);
  std::vector<uint8_t> out(static_cast<size_t>(pack_bytes(n, k)));
  auto* value = reinterpret_cast<uint16_t*>(out.data() + kPackHeaderBytes);
  auto* position = reinterpret_cast<uint32_t*>(out.data() + kPackHeaderBytes + np * kp);
  *where = {-1, 0, 0};
  int64_t nonzeros = 0;
  for (int64_t row = 0; row < np; ++row)
    for (int64_t group = 0; group < kp / 4; ++group) {
      uint16_t four[4] = {};
      int count = 0;
      for (int64_t i = 0; i < 4 && row < n && 4 * group + i < k; ++i) {
        four[i] = weight[row * stride_n + (4 * group + i) * stride_k];
        count += !is_zero(four[i]);
      }
      if (count > 2) {
        *where = {row, 4 * group, count};
        return {};
      }
      nonzeros += count;
      int kept[2];
      choose(four, kept);
      for (int i = 0; i < 2; ++i) {
        const uint16_t bits = four[kept[i]];
        value[row * (kp / 2) + 2 * group + i] = is_zero(bits) ? uint16_t{0} : bits;
      }
      const Place p = place(row, group, kp);
      position[p.word] |= static_cast<uint32_t>(kept[0] | kept[1] << 2) << p.shift;
    }
  PackHeader header{};
  std::memcpy(header.magic, "fspk", 4);
  header.format = kFormat;
  header.version = kVersion;
  header.dtype = dtype == DType::f16 ? kF16 : kBf16;
  header.block = kBlock;
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
  if (h.format != kFormat) return "got format " + text(h.format) + ", expected 5 (nm24)";
  if (h.version != kVersion) return "got nm24 version " + text(h.version) + ", this build reads version 1";
  if ((h.dtype != kF16 && h.dtype != kBf16) || h.block != kBlock)
    return "got dtype code " + text(h.dtype) + " and block " + text(h.block) + ", expected 3 or 4 and 4";
  // Sides below 2^31: their product, and so pack_bytes(), is below 2^63.
  const bool sides = h.n >= 0 && h.k >= 0 && h.n < kLargestSide && h.k < kLargestSide;
  if (!sides || h.nonzeros < 0 || h.nonzeros > h.n * h.k)
    return "got a damaged header: N=" + text(h.n) + ", K=" + text(h.k) + ", " + text(h.nonzeros) + " non-zeros";
  for (uint8_t byte : h.zero)
    if (byte != 0) return "got a damaged header: reserved bytes that are not zero";
  const int64_t expected = pack_bytes(h.n, h.k);
  if (size != expected || h.bytes != static_cast<uint64_t>(expected))
    return "got " + text(size) + " bytes (the header says " + text(h.bytes) + "), expected " + text(expected);
  *out = {h.n, h.k, h.dtype == kF16 ? DType::f16 : DType::bf16,
          reinterpret_cast<const uint16_t*>(bytes + kPackHeaderBytes),
          reinterpret_cast<const uint32_t*>(bytes + kPackHeaderBytes + padded_n(h.n) * padded_k(h.k))};
  return "";
}

std::string validate(const uint8_t* bytes, int64_t size, Weight* out) {
  if (size < kPackHeaderBytes) return "got " + std::to_string(size) + " bytes, a header alone has 64";
  PackHeader header;
  std::memcpy(&header, bytes, sizeof header);
  const std::string error = view(header, bytes, size, out);
  if (!error.empty()) return error;
  // There is one way to pack a weight, so packing again shows every byte that is not as it should be.
  std::vector<uint16_t> weight(static_cast<size_t>(out->n * out->k));
  unpack(*out, weight.data());
  NotSparse where;
  const std::vector<uint8_t> again = pack(weight.data(), out->k, 1, out->n, out->k, out->dtype, &where);
  if (!std::equal(again.begin(), again.end(), bytes, bytes + size))
    return "got a damaged pack: values and positions that do not fit each other or the header";
  return "";
}

void unpack(const Weight& p, uint16_t* weight) {
  const int64_t kp = padded_k(p.k);
  if (p.n > 0 && p.k > 0) std::memset(weight, 0, static_cast<size_t>(p.n * p.k) * 2);
  for (int64_t row = 0; row < p.n; ++row)
    for (int64_t group = 0; 4 * group < p.k; ++group) {
      const Place at = place(row, group, kp);
      const uint32_t bits = p.position[at.word] >> at.shift & 15;
      for (int i = 0; i < 2; ++i) {
        const int64_t k = 4 * group + (bits >> (2 * i) & 3);
        if (k < p.k) weight[row * p.k + k] = p.value[row * (kp / 2) + 2 * group + i];
      }
    }
}

}  // namespace fs::sparse_matmul::nm24
