// The table of kernels and the size thresholds of the family: short pure functions, each with its measurement.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../families.h"
#include "../runtime/isa.h"
#include "qdq.h"

namespace fs::qdq {

// The first row that fits this CPU and the cap in force. Throws what isa::current_level() throws.
const Kernels& select();

// Every row of the table, best first (whether or not this CPU runs it), and the same for `_C.kernels()`.
std::vector<const Kernels*> table();
std::vector<KernelInfo> kernel_infos();

// Test hook behind `_C.spoil_kernel`: the row of this name gets its first result wrong by one; "" mends it.
// Throws std::invalid_argument for a name that is not in the table. Not to be called while kernels run.
void spoil(const std::string& name);

// True: the output is stored past the caches, as it is too large to be still there when it is read.
bool stream(int64_t output_bytes);

// Threads that share so many elements.
int64_t threads_for(int64_t elements);

}  // namespace fs::qdq
