// The table of kernels and the thresholds of the family: short pure functions, each with its measurement.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../families.h"
#include "../runtime/isa.h"
#include "kl_loss.h"

namespace fs::kl_loss {

// The first row that fits this CPU and the cap in force. Throws what isa::current_level() throws.
const Kernels& select();

// Every row of the table, best first (whether or not this CPU runs it), and the same for `_C.kernels()`.
std::vector<const Kernels*> table();
std::vector<KernelInfo> kernel_infos();

// Test hook behind `_C.spoil_kernel`: the row of this name gets its first kl wrong by one; "" mends it.
// Throws std::invalid_argument for a name that is not in the table. Not to be called while kernels run.
void spoil(const std::string& name);

// True where the gradient goes past the caches: so many bytes do not stay there until backward anyway.
bool stream(int64_t grad_bytes);

// Threads that so many logits are worth.
int64_t threads_for(int64_t logits, int64_t threads);

}  // namespace fs::kl_loss
