#include "int8_select.h"

#include "../runtime/table.h"

namespace fs::sparse_matmul::int8 {
namespace {

constexpr const Kernels* kRows[] = {
#if defined(__x86_64__)
    &kAvx512Vbmi2,  // Ice Lake, Sapphire Rapids, Zen 4
    &kAvx512,       // Cascade Lake
    &kAvxVnni,      // Alder Lake and later client cores
    &kAvx2,         // Haswell to Comet Lake, Zen 1 to 3
#endif
    &kScalar,
};

Table<Kernels> kernels(kRows);

void wrong_bitmap(const FewArgs& a) {
  kernels.spoiled().bitmap(a);
  a.acc[0] += 1;
}

void wrong_windows(const WindowArgs& a) {
  kernels.spoiled().windows(a);
  a.acc[0] += 1;
}

void wrong_blocks(const PanelArgs& a) {
  kernels.spoiled().blocks(a);
  a.sums[0] += 1;
}

}  // namespace

const Kernels& select() { return kernels.select(); }

std::vector<const Kernels*> table() { return kernels.all(); }

void spoil(const std::string& name) {
  kernels.spoil("sparse_int8", name, [](Kernels& copy) {
    copy.bitmap = &wrong_bitmap;
    copy.windows = &wrong_windows;
    copy.blocks = &wrong_blocks;
  });
}

void pin(const std::string& name) { kernels.pin("sparse_int8", name); }

std::vector<KernelInfo> kernel_infos() {
  return kernels.infos([](const Kernels& row) {
    return std::to_string(row.few_rows) + "x" + std::to_string(kTileOutputs) + ", " + std::to_string(kWindowRows) +
           "x" + std::to_string(kWindowOutputs) + ", " + std::to_string(4 * row.width) + "x1, " +
           std::to_string(4 * row.width) + "x4";
  });
}

// 4096 x 4096 at 50% zeros from DRAM (Zen 5): 2 KB ahead 665 us, 4 KB 619, 8 to 16 KB 424 to 460.
int64_t prefetch_ahead(int64_t pack_bytes) { return pack_bytes > isa::l2_bytes() ? 12288 : 0; }

}  // namespace fs::sparse_matmul::int8
