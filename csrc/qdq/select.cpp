#include "select.h"

#include "../runtime/parallel.h"
#include "../runtime/table.h"

#if defined(FASTSPARSE_WITH_CUDA)
#include "cuda/sm80.h"
#endif

namespace fs::qdq {
namespace {

constexpr const Kernels* kRows[] = {
#if defined(__x86_64__)
    &kAvx512,  // Skylake-X and later, Zen 4
    &kAvx2,    // Haswell to Comet Lake, Alder Lake, Zen 1 to 3
#endif
    &kScalar,
};

Table<Kernels> kernels(kRows);

void wrong_quantize(const MapArgs& a) {
  kernels.spoiled().quantize(a);
  if (a.rows > 0 && a.length > 0) *static_cast<int8_t*>(a.out) ^= 1;
}

}  // namespace

const Kernels& select() { return kernels.select(); }

std::vector<const Kernels*> table() { return kernels.all(); }

void spoil(const std::string& name) {
  kernels.spoil("qdq", name, [](Kernels& copy) { copy.quantize = &wrong_quantize; });
}

std::vector<KernelInfo> kernel_infos() {
  std::vector<KernelInfo> infos = kernels.infos([](const Kernels& row) { return "1x" + std::to_string(row.group); });
#if defined(FASTSPARSE_WITH_CUDA)
  infos.push_back({"", sm80::kName, "cuda", "1x8", true, true, sm80::kProven});
#endif
  return infos;
}

bool stream(int64_t output_bytes) { return output_bytes >= (int64_t{4} << 20); }

int64_t threads_for(int64_t elements) { return elements < (int64_t{1} << 15) ? 1 : num_threads(); }

}  // namespace fs::qdq
