// The table of kernels of sparse_int8_linear, and its shape thresholds.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../families.h"
#include "int8.h"

namespace fs::sparse_matmul::int8 {

// The first row that fits this CPU and the cap in force. Throws what isa::current_level() throws.
const Kernels& select();

std::vector<const Kernels*> table();
std::vector<KernelInfo> kernel_infos();

// Test hooks (runtime/table.h); not to be called while kernels run. pin() is for the row avx512, which avx512vbmi2
// hides.
void spoil(const std::string& name);
void pin(const std::string& name);

// Bytes of values that are asked for ahead of their use; 0 where the pack lies in L2.
int64_t prefetch_ahead(int64_t pack_bytes);

// True: the work is too small for a second thread.
inline bool one_thread(int64_t m, int64_t stored) { return m * stored < (int64_t{1} << 17); }

}  // namespace fs::sparse_matmul::int8
