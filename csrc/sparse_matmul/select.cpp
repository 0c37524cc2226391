#include "select.h"

#include "../runtime/table.h"

#if defined(FASTSPARSE_WITH_CUDA)
#include "cuda/sm80.h"
#endif

namespace fs::sparse_matmul {
namespace {

constexpr const Kernels* kRows[] = {
#if defined(__x86_64__)
    &kAvx512Vbmi2,  // Ice Lake, Sapphire Rapids, Zen 4
    &kAvx512,       // Cascade Lake
    &kAvx2,         // Haswell to Comet Lake, Alder Lake, Zen 1 to 3
#endif
    &kScalar,
};

Table<Kernels> kernels(kRows);

void wrong_finish(const FinishArgs& f) {
  kernels.spoiled().finish(f);
  if (f.count > 0) f.y[0] += 1;
}

void wrong_finish_columns(const ColumnsArgs& a) {
  kernels.spoiled().finish_columns(a);
  if (a.rows > 0 && a.columns > 0) a.y[0] += 1;
}

}  // namespace

// A pack from which on one row is taken to come from DRAM.
constexpr int64_t kLargeSell8 = 8 << 20;

const Kernels& select() { return kernels.select(); }

bool prefetch_sell8(const Pack& w, int64_t rows) {
  if (w.format != kSell8 || w.block == kSell8x16Rows) return false;  // narrow slices are not that many
  if (w.block == kSell8x32Rows) return rows > 1;
  // Zen 4 follows the one stream by itself and loses 5 to 35%; Zen 5 gains 10% from DRAM.
  return !isa::zen4() && (rows > 1 || w.total * sell8_group_bytes(w.block, w.bf16 ? 2 : 4) >= kLargeSell8);
}

std::vector<const Kernels*> table() { return kernels.all(); }

void spoil(const std::string& name) {
  kernels.spoil("sparse_matmul", name, [](Kernels& copy) {
    copy.finish = &wrong_finish;
    copy.finish_columns = &wrong_finish_columns;
  });
}

void pin(const std::string& name) { kernels.pin("sparse_matmul", name); }

std::vector<KernelInfo> kernel_infos() {
  std::vector<KernelInfo> infos = kernels.infos([](const Kernels&) { return "4x32, 3x16, 32x8"; });
#if defined(FASTSPARSE_WITH_CUDA)
  infos.push_back({"", sm80::kName, "cuda", "16x32, 128x128", true, true, sm80::kProven});
#endif
  return infos;
}

}  // namespace fs::sparse_matmul
