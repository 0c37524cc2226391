// sparse_int8_linear, scalar: the level that every machine runs, and the plainest statement of what the others compute.
// Sums are unsigned: those of a damaged pack may wrap.
#include <stdint.h>
#include <string.h>

namespace {

struct Lanes {
  static constexpr int kWidth = 8;
  static constexpr int kSteps = 1;
  static constexpr bool kXOuter = false;
  static constexpr int kQuadVecs = 1;
  static constexpr bool kFourWeights = false;
  struct V {
    uint32_t v[kWidth];
  };
  using X = const uint8_t*;
  struct Weight {
    int8_t w[4];
  };
  static V zero() { return {}; }
  static V set1(int32_t value) {
    V s;
    for (uint32_t& v : s.v) v = static_cast<uint32_t>(value);
    return s;
  }
  static V load(const int32_t* p) {
    V s;
    memcpy(s.v, p, sizeof s.v);
    return s;
  }
  static void store(int32_t* p, const V& s) { memcpy(p, s.v, sizeof s.v); }
  static V add(const V& a, const V& b) {
    V s;
    for (int i = 0; i < kWidth; ++i) s.v[i] = a.v[i] + b.v[i];
    return s;
  }
  static Weight weight(const int8_t* p) {
    Weight w;
    memcpy(w.w, p, sizeof w.w);
    return w;
  }
  static X x(const uint8_t* p, int64_t) { return p; }
  static V dot(V s, X x, Weight w) {
    for (int i = 0; i < kWidth; ++i)
      for (int k = 0; k < 4; ++k) s.v[i] += static_cast<uint32_t>(static_cast<int8_t>(x[4 * i + k]) * w.w[k]);
    return s;
  }
};

}  // namespace

#include "int8_blocks.inl"

namespace {

void bitmap(const FewArgs& a) {
  const Bitmap& w = a.weight;
  const int64_t steps = w.steps();
  for (int64_t p = 0; p < a.panels; ++p) {
    const int64_t panel = a.panel + p;
    for (int64_t r = 0; r < a.rows; ++r) {
      const auto total = static_cast<uint64_t>(w.total);
      uint64_t position = w.offset[panel] < total ? w.offset[panel] : total;
      uint32_t sums[kTileOutputs];
      for (int64_t j = 0; j < kTileOutputs; ++j)
        sums[j] = 0u - static_cast<uint32_t>(a.offset) * static_cast<uint32_t>(w.sum[panel * kTileOutputs + j]);
      for (int64_t i = 0; i < steps; ++i) {
        int8_t x[kTileK];
        memcpy(x, a.x + r * a.x_stride + i * kTileK, kTileK);
        for (uint64_t m = w.mask[panel * steps + i]; m != 0 && position < total; m &= m - 1) {
          const int bit = __builtin_ctzll(m);
          sums[bit / kTileK] += static_cast<uint32_t>(w.value[position++] * x[bit % kTileK]);
        }
      }
      memcpy(a.acc + r * fs::int8_gemm::kMaxTileColumns + p * kTileOutputs, sums, sizeof sums);
    }
  }
}

}  // namespace

namespace {
using Code = int8_t;
}  // namespace

#include "int8_windows_plain.inl"

const Kernels fs::sparse_matmul::int8::kScalar = {"scalar",
                                                  fs::isa::Level::scalar,
                                                  fs::isa::kLevelScalar,
                                                  &fs::int8_gemm::kScalar,
                                                  &fs::sparse_matmul::kScalar,
                                                  4,
                                                  Lanes::kWidth,
                                                  &bitmap,
                                                  &windows,
                                                  &blocks};
