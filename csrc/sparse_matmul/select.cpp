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

const Kernels& select() { return kernels.select(); }

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
