// windows_s8 without a permutation of 64 bytes: place by place, there to read a pack, not for speed. The level brings,
// before this, `Code`: what a code of x is (u8, s8 or s16). Sums are unsigned: those of a damaged pack may wrap.
#include <string.h>

#include "../int8.h"

namespace {

using namespace fs::sparse_matmul::int8;

void windows(const WindowArgs& a) {
  const Windows& w = a.weight;
  constexpr int64_t kPlaces = kWindowOutputs * kSlots;
  for (int64_t i = 0; i < a.slices; ++i)
    for (int64_t r = 0; r < a.rows; ++r) {
      const Code* x = reinterpret_cast<const Code*>(a.x + r * a.x_stride);
      uint32_t sums[kWindowOutputs];
      for (int64_t j = 0; j < kWindowOutputs; ++j)
        sums[j] =
            0u - static_cast<uint32_t>(a.offset) * static_cast<uint32_t>(w.sum[(a.slice + i) * kWindowOutputs + j]);
      for (int64_t step = w.begin(a.slice + i); step < w.end(a.slice + i); ++step) {
        const uint8_t* index = w.step + step * kStepBytes;
        const auto* value = reinterpret_cast<const int8_t*>(index + kPlaces);
        const Code* codes = x + w.base[step] * kTileK;
        for (int64_t j = 0; j < kWindowOutputs; ++j, index += kSlots, value += kSlots)
          for (int64_t slot = 0; slot < kSlots; ++slot)
            sums[j] += static_cast<uint32_t>(static_cast<int32_t>(codes[index[slot]]) * value[slot]);
      }
      memcpy(a.acc + r * fs::int8_gemm::kMaxTileColumns + i * kWindowOutputs, sums, sizeof sums);
    }
}

}  // namespace
