// int8_gemm, scalar: the level that every machine runs, and the plainest statement of what the others compute.
// Tile     4 rows x 16 columns, sums in memory that the compiler keeps in registers where it can.
// Measured see docs/kernels/int8_gemm.md; it is there to be right, not fast.
#include "../../runtime/simd/scalar.h"

namespace {

struct Panel {
  static constexpr int kBytes = 1;
  static constexpr int kOffset = 0;
  static void store4(uint8_t* p, int32_t q0, int32_t q1, int32_t q2, int32_t q3) {
    p[0] = static_cast<uint8_t>(q0);
    p[1] = static_cast<uint8_t>(q1);
    p[2] = static_cast<uint8_t>(q2);
    p[3] = static_cast<uint8_t>(q3);
  }
  static void store4(uint8_t* p, const int8_t* a) { memcpy(p, a, 4); }
};

}  // namespace

#include "elementwise.inl"

namespace {

constexpr int kRows = 4;

void tile(const TileArgs& t) {
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t n = 0; n < t.columns; n += kPanelColumns) {
      // Unsigned: a partial sum may wrap, the whole one does not (int8_gemm.h).
      uint32_t sums[kPanelColumns];
      for (int j = 0; j < kPanelColumns; ++j)
        sums[j] = 0u - static_cast<uint32_t>(t.offset) * static_cast<uint32_t>(t.column_sum[n + j]);
      const int8_t* w = t.weight + n / kPanelColumns * t.panel_stride;
      for (int64_t step = 0; step < t.k_steps; ++step, w += kPanelColumns * kStepK) {
        const int64_t k = step * kStepK;
        int8_t a[kStepK];
        memcpy(a, t.panel + k / kBlockBytes * t.block_stride + r * kRowStride + k % kBlockBytes, kStepK);
        for (int j = 0; j < kPanelColumns; ++j)
          for (int i = 0; i < kStepK; ++i) sums[j] += static_cast<uint32_t>(a[i] * w[j * kStepK + i]);
      }
      memcpy(t.acc + r * kMaxTileColumns + n, sums, sizeof sums);
    }
  }
}

}  // namespace

#include "weight_only_scalar.inl"

const Kernels fs::int8_gemm::kScalar = {"scalar",
                                        fs::isa::Level::scalar,
                                        fs::isa::kLevelScalar,
                                        Panel::kBytes,
                                        Panel::kOffset,
                                        kRows,
                                        1,
                                        kRows,
                                        kMaxTileColumns,
                                        kPanelColumns,
                                        &quantize,
                                        &widen,
                                        &tile,
                                        &epilogue,
                                        nullptr,
                                        nullptr,
                                        nullptr,
                                        nullptr,
                                        &weight_only,
                                        nullptr};
