#include "select.h"

#include <algorithm>

#include "../runtime/table.h"

#if defined(FASTSPARSE_WITH_CUDA)
#include "cuda/sm80.h"
#endif

namespace fs::kl_loss {
namespace {

constexpr const Kernels* kRows[] = {
#if defined(__x86_64__)
    &kAvx512,  // Skylake-X on, Zen 4
    &kAvx2,    // Haswell to Comet Lake, Alder Lake, Zen 1 to 3
#endif
    &kScalar,
};

Table<Kernels> kernels(kRows);

void wrong_rows(const RowsArgs& a) {
  kernels.spoiled().rows(a);
  if (a.rows > 0) a.kl[0] += 1;
}

}  // namespace

const Kernels& select() { return kernels.select(); }

std::vector<const Kernels*> table() { return kernels.all(); }

void spoil(const std::string& name) {
  kernels.spoil("kl_loss", name, [](Kernels& copy) { copy.rows = &wrong_rows; });
}

std::vector<KernelInfo> kernel_infos() {
  std::vector<KernelInfo> infos = kernels.infos([](const Kernels& row) { return "1x" + std::to_string(row.width); });
#if defined(FASTSPARSE_WITH_CUDA)
  infos.push_back({"", sm80::kName, "cuda", "1x8", true, true, sm80::kProven});
#endif
  return infos;
}

bool stream(int64_t grad_bytes) { return grad_bytes > 4 * isa::l2_bytes(); }

int64_t threads_for(int64_t logits, int64_t threads) { return logits < (int64_t{1} << 14) ? 1 : threads; }

}  // namespace fs::kl_loss
