#include "select.h"

#include <stdexcept>

#include "../runtime/parallel.h"

namespace fs::qdq {
namespace {

constexpr const Kernels* kTable[] = {
#if defined(__x86_64__)
    &kAvx512,  // Skylake-X and later, Zen 4
    &kAvx2,    // Haswell to Comet Lake, Alder Lake, Zen 1 to 3
#endif
    &kScalar,
};

const Kernels* spoiled_row = nullptr;  // spoil()
Kernels spoiled_copy;

void spoiled_quantize(const MapArgs& a) {
  spoiled_row->quantize(a);
  if (a.rows > 0 && a.length > 0) *static_cast<int8_t*>(a.out) ^= 1;
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
    spoiled_copy.quantize = &spoiled_quantize;
    spoiled_row = row;
    return;
  }
  throw std::invalid_argument("spoil_kernel: qdq has no kernel named " + name);
}

std::vector<const Kernels*> table() { return {std::begin(kTable), std::end(kTable)}; }

std::vector<KernelInfo> kernel_infos() {
  std::vector<KernelInfo> infos;
  const std::string selected = select().name;
  for (const Kernels* row : kTable)
    infos.push_back({"", row->name, isa::level_name(row->level), "1x" + std::to_string(row->group),
                     isa::usable(row->level, row->features), row->name == selected, true});
  return infos;
}

bool stream(int64_t output_bytes) { return output_bytes >= (int64_t{4} << 20); }

int64_t threads_for(int64_t elements) { return elements < (int64_t{1} << 15) ? 1 : num_threads(); }

}  // namespace fs::qdq
