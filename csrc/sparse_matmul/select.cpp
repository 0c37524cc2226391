#include "select.h"

#include <stdexcept>

namespace fs::sparse_matmul {
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

void spoiled_finish(const FinishArgs& f) {
  spoiled_row->finish(f);
  if (f.count > 0) f.y[0] += 1;
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
    spoiled_copy.finish = &spoiled_finish;
    spoiled_row = row;
    return;
  }
  throw std::invalid_argument("spoil_kernel: sparse_matmul has no kernel named " + name);
}

std::vector<const Kernels*> table() { return {std::begin(kTable), std::end(kTable)}; }

std::vector<KernelInfo> kernel_infos() {
  std::vector<KernelInfo> infos;
  const std::string selected = select().name;
  for (const Kernels* row : kTable)
    infos.push_back({"", row->name, isa::level_name(row->level), "3x32, 3x16, 64x1",
                     isa::usable(row->level, row->features), row->name == selected, true});
  return infos;
}

}  // namespace fs::sparse_matmul
