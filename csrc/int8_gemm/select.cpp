#include "select.h"

#include <algorithm>
#include <stdexcept>

#if defined(FASTSPARSE_WITH_CUDA)
#include "cuda/sm80.h"
#endif

namespace fs::int8_gemm {
namespace {

constexpr const Kernels* kTable[] = {
#if defined(__x86_64__)
    &kAvx512,  // Cascade Lake, Ice Lake, Sapphire Rapids, Zen 4
    &kAvx2,    // Haswell to Comet Lake, Alder Lake, Zen 1 to 3
#endif
    &kScalar,
};

const Kernels* spoiled_row = nullptr;  // spoil()
Kernels spoiled_copy;

void spoiled_tile(const TileArgs& t) {
  spoiled_row->tile(t);
  t.acc[0] += 1;
}

}  // namespace

const Kernels& select() {
  for (const Kernels* row : kTable)
    if (isa::usable(row->level, row->features)) return row == spoiled_row ? spoiled_copy : *row;
  return kScalar;
}

void spoil(const std::string& name) {
  spoiled_row = nullptr;
  if (name.empty()) return;
  for (const Kernels* row : kTable) {
    if (name != row->name) continue;
    spoiled_copy = *row;
    spoiled_copy.tile = &spoiled_tile;
    spoiled_row = row;
    return;
  }
  throw std::invalid_argument("spoil_kernel: int8_gemm has no kernel named " + name);
}

std::vector<const Kernels*> table() { return {std::begin(kTable), std::end(kTable)}; }

std::vector<KernelInfo> kernel_infos() {
  std::vector<KernelInfo> infos;
  const std::string selected = select().name;
  for (const Kernels* row : kTable) {
    const std::string tile = std::to_string(row->max_rows) + "x" + std::to_string(row->many_columns) + ", " +
                             std::to_string(row->few_rows) + "x" + std::to_string(row->few_columns);
    infos.push_back({"", row->name, isa::level_name(row->level), tile, isa::usable(row->level, row->features),
                     row->name == selected, true});
  }
#if defined(FASTSPARSE_WITH_CUDA)
  infos.push_back({"", sm80::kName, "cuda", "64x64", true, true, sm80::kProven});
#endif
  return infos;
}

int64_t chunk_rows(const Kernels& kernels, int64_t m, int64_t k) {
  const int64_t row_bytes = (k * kernels.panel_bytes + kBlockBytes - 1) / kBlockBytes * kRowStride;
  const int64_t fit = isa::l2_bytes() / 4 / std::max<int64_t>(row_bytes, 1);
  const int64_t tallest = std::clamp<int64_t>(fit, kernels.max_rows, 128);
  // Even chunks: 130 rows are 65 + 65, not 128 + 2.
  const int64_t chunks = (m + tallest - 1) / tallest;
  return (m + chunks - 1) / chunks;
}

bool split_rows(int64_t m, int64_t n, int64_t k) { return m >= 128 || (m >= 16 && n * k < (int64_t{1} << 20)); }

int64_t prefetch_ahead(int64_t n, int64_t k) { return n * k > isa::l2_bytes() ? 1024 : 0; }

}  // namespace fs::int8_gemm
