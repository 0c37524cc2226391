// weight_only_linear, scalar: the plainest statement of what the other levels compute.
#include "weight_only.inl"

namespace {

constexpr int kWeightOnlyRows = 4;

// weight(panel, j, k) -> w of column j of that panel, zero point taken off; scale(panel, j, g) -> its scale.
template <class Weight, class Scale>
void tile_groups(const GroupTileArgs& t, int64_t depth, const Weight& weight, const Scale& scale) {
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t n = 0; n < t.columns; ++n) {
      const int64_t panel = n / kPanelColumns, j = n % kPanelColumns;
      float acc = 0;
      for (int64_t g = 0; g < t.groups; ++g) {
        int32_t sum = 0;
        const int64_t end = (g + 1) * t.group < depth ? (g + 1) * t.group : depth;
        for (int64_t k = g * t.group; k < end; ++k)
          sum += t.x[k / kBlockK * t.block_stride + r * kBlockK + k % kBlockK] * weight(panel, j, k, g);
        acc = Simd::fma(static_cast<float>(sum), t.x_scale[g * t.group_stride + r] * scale(panel, j, g), acc);
      }
      t.acc[r * kWeightOnlyColumns + n] = acc;
    }
  }
}

void tile_u4(const GroupTileArgs& t) {
  tile_groups(
      t, t.groups * t.group,
      [&](int64_t panel, int64_t j, int64_t k, int64_t g) -> int32_t {
        const uint8_t byte = t.weight[panel * t.panel_stride + k / 8 * 64 + j * 4 + k % 4];
        int32_t point = 8;
        if (t.zero != nullptr) {
          const uint8_t two = t.zero[panel * t.zero_stride + g * 8 + j % 8];
          point = j < 8 ? two & 15 : two >> 4;
        }
        return (k % 8 < 4 ? byte & 15 : byte >> 4) - point;
      },
      [&](int64_t panel, int64_t j, int64_t g) {
        fs::f16 bits;
        memcpy(&bits, t.scale + panel * t.scale_stride + g * kPanelColumns + j, 2);
        return Simd::load(&bits);
      });
}

void tile_s8(const GroupTileArgs& t) {
  tile_groups(
      t, t.k_steps * kStepK,
      [&](int64_t panel, int64_t j, int64_t k, int64_t) -> int32_t {
        return static_cast<int8_t>(t.weight[panel * t.panel_stride + k / 4 * 64 + j * 4 + k % 4]);
      },
      [&](int64_t panel, int64_t j, int64_t) { return t.scale_f32[panel * kPanelColumns + j]; });
}

constexpr WeightOnlyKernels weight_only = {kWeightOnlyRows, &quantize_groups, &tile_u4, &tile_s8, &finish};

}  // namespace
