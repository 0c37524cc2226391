// What `_C` tells about the build and the kernels, and its hooks for benches and tests. Torch-free.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "export.h"

namespace fs {

struct KernelInfo {
  std::string family, name, level, tile;
  bool usable;    // by this CPU under the cap in force
  bool selected;  // the row that runs now
  bool proven;    // it has run on hardware; what has not is off by default
};

FASTSPARSE_API std::map<std::string, std::string> build_info();
FASTSPARSE_API std::vector<KernelInfo> kernels();
FASTSPARSE_API int64_t scratch_allocations();

// Test hook: the tile of this row of a family's table gets its first sum wrong by one; an empty name mends it.
FASTSPARSE_API void spoil_kernel(const std::string& family, const std::string& name);

FASTSPARSE_API double time_int8_linear(int64_t m, int64_t n, int64_t k, int64_t repeats, int64_t copies);

}  // namespace fs
