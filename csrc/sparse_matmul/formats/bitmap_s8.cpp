#include "bitmap_s8.h"

#include <algorithm>

#include "header_s8.h"

namespace fs::sparse_matmul::bitmap_s8 {
namespace {

using int8::Bitmap;
using int8::kTileK;
using int8::kTileOutputs;

// Where the sections begin.
struct Layout {
  int64_t offset, mask, value, sum, bytes;
  Layout(int64_t n, int64_t k, int64_t total) {
    const int64_t panels = (n + kTileOutputs - 1) / kTileOutputs, steps = (k + kTileK - 1) / kTileK;
    offset = kPackHeaderBytes;
    mask = offset + round_to_64(8 * (panels + 1));
    value = mask + round_to_64(8 * panels * steps);
    sum = value + round_to_64(total + int8::kRoom);
    bytes = sum + 4 * kTileOutputs * panels;
  }
};

Bitmap parts(const Layout& at, const uint8_t* bytes, int64_t n, int64_t k, int64_t total) {
  return {n,
          k,
          total,
          reinterpret_cast<const uint64_t*>(bytes + at.offset),
          reinterpret_cast<const uint64_t*>(bytes + at.mask),
          reinterpret_cast<const int8_t*>(bytes + at.value),
          reinterpret_cast<const int32_t*>(bytes + at.sum)};
}

}  // namespace

std::vector<uint8_t> pack(const int8_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k) {
  int64_t total = 0;
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i) total += weight[row * stride_n + i * stride_k] != 0;
  const Layout at(n, k, total);
  std::vector<uint8_t> out(static_cast<size_t>(at.bytes));
  const PackHeader header = s8_header(kFormat, kBlock, n, k, total, out.size());
  std::memcpy(out.data(), &header, sizeof header);
  auto* offset = reinterpret_cast<uint64_t*>(out.data() + at.offset);
  auto* mask = reinterpret_cast<uint64_t*>(out.data() + at.mask);
  auto* value = reinterpret_cast<int8_t*>(out.data() + at.value);
  auto* sum = reinterpret_cast<int32_t*>(out.data() + at.sum);
  uint64_t position = 0;
  const Bitmap shape = parts(at, out.data(), n, k, total);
  for (int64_t panel = 0; panel < shape.panels(); ++panel) {
    offset[panel] = position;
    const int64_t outputs = std::min(kTileOutputs, n - panel * kTileOutputs);
    for (int64_t step = 0; step < shape.steps(); ++step, ++mask) {
      const int64_t depth = std::min(kTileK, k - step * kTileK);
      for (int64_t j = 0; j < outputs; ++j)
        for (int64_t i = 0; i < depth; ++i) {
          const int64_t row = panel * kTileOutputs + j;
          const int8_t w = weight[row * stride_n + (step * kTileK + i) * stride_k];
          if (w == 0) continue;
          *mask |= uint64_t{1} << (kTileK * j + i);
          value[position++] = w;
          sum[row] += w;
        }
    }
  }
  offset[shape.panels()] = position;
  return out;
}

std::string view(const PackHeader& h, const uint8_t* bytes, int64_t size, Bitmap* out) {
  if (h.block != kBlock) return "got block " + std::to_string(h.block) + ", expected 16 for bitmap_s8";
  std::string error = s8_header_error(h);
  if (!error.empty()) return error;
  const Layout at(h.n, h.k, h.nonzeros);
  error = s8_size_error(h, size, at.bytes);
  if (error.empty()) *out = parts(at, bytes, h.n, h.k, h.nonzeros);
  return error;
}

std::string validate(const PackHeader& h, const uint8_t* bytes, int64_t size, Bitmap* out) {
  const std::string error = view(h, bytes, size, out);
  if (!error.empty()) return error;
  // There is one way to pack a weight, so packing again shows every byte that is not as it should be.
  std::vector<int8_t> weight(static_cast<size_t>(h.n * h.k));
  unpack(*out, weight.data());
  const std::vector<uint8_t> again = pack(weight.data(), h.k, 1, h.n, h.k);
  if (!std::equal(again.begin(), again.end(), bytes, bytes + size))
    return "got a damaged pack: offsets, masks, values and sums that do not fit each other or the header";
  return "";
}

void unpack(const Bitmap& p, int8_t* weight) {
  if (p.n > 0 && p.k > 0) std::memset(weight, 0, static_cast<size_t>(p.n * p.k));
  const uint64_t* mask = p.mask;
  for (int64_t panel = 0; panel < p.panels(); ++panel) {
    auto position = static_cast<int64_t>(std::min<uint64_t>(p.offset[panel], static_cast<uint64_t>(p.total)));
    for (int64_t step = 0; step < p.steps(); ++step, ++mask)
      for (int64_t bit = 0; bit < kTileOutputs * kTileK; ++bit) {
        if ((*mask >> bit & 1) == 0 || position == p.total) continue;
        const int8_t w = p.value[position++];
        const int64_t row = panel * kTileOutputs + bit / kTileK, i = step * kTileK + bit % kTileK;
        if (row < p.n && i < p.k) weight[row * p.k + i] = w;
      }
  }
}

}  // namespace fs::sparse_matmul::bitmap_s8
