#include "select.h"

#include <algorithm>
#include <stdexcept>

namespace fs::kl_loss {
namespace {

constexpr const Kernels* kTable[] = {
#if defined(__x86_64__)
    &kAvx512,  // Skylake-X on, Zen 4
    &kAvx2,    // Haswell to Comet Lake, Alder Lake, Zen 1 to 3
#endif
    &kScalar,
};

const Kernels* spoiled_row = nullptr;  // spoil()
Kernels spoiled_copy;

void spoiled_rows(const RowsArgs& a) {
  spoiled_row->rows(a);
  if (a.rows > 0) a.kl[0] += 1;
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
    spoiled_copy.rows = &spoiled_rows;
    spoiled_row = row;
    return;
  }
  throw std::invalid_argument("spoil_kernel: kl_loss has no kernel named " + name);
}

std::vector<const Kernels*> table() { return {std::begin(kTable), std::end(kTable)}; }

std::vector<KernelInfo> kernel_infos() {
  std::vector<KernelInfo> infos;
  const std::string selected = select().name;
  for (const Kernels* row : kTable)
    infos.push_back({"", row->name, isa::level_name(row->level), "1x" + std::to_string(row->width),
                     isa::usable(row->level, row->features), row->name == selected, true});
  return infos;
}

bool stream(int64_t grad_bytes) { return grad_bytes > 4 * isa::l2_bytes(); }

int64_t threads_for(int64_t logits, int64_t threads) { return logits < (int64_t{1} << 14) ? 1 : threads; }

}  // namespace fs::kl_loss
