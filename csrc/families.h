// The families in this binary, as `_C` shows them: their kernels, and the hooks of benches and tests. Torch-free.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "runtime/export.h"

namespace fs {

struct KernelInfo {
  std::string family, name, level, tile;
  bool usable;    // by this CPU under the cap in force
  bool selected;  // the row that runs now
  bool proven;    // it has run on hardware; what has not is off by default
};

// One row a family in families.cpp; the functions are those of the family's select.cpp.
struct Family {
  const char* name;
  std::vector<KernelInfo> (*kernels)();
  void (*spoil)(const std::string& kernel);
};

FASTSPARSE_API std::map<std::string, std::string> build_info();
FASTSPARSE_API std::vector<KernelInfo> kernels();
FASTSPARSE_API int64_t scratch_allocations();

// Test hook: this row of a family's table gets its first result wrong by one; an empty name mends it.
// Not to be called while kernels run. Throws std::invalid_argument for a name that does not exist.
FASTSPARSE_API void spoil_kernel(const std::string& family, const std::string& name);

// Test hook: this row of sparse_int8 runs where it is usable, whatever comes before it; an empty name ends it.
FASTSPARSE_API void pin_sparse_int8(const std::string& name);
FASTSPARSE_API void pin_sparse_matmul(const std::string& name);  // the same of that family

// Bench hook of int8_gemm: seconds per call of the kernel alone, float32, over `copies` weights in turn.
FASTSPARSE_API double time_int8_linear(int64_t m, int64_t n, int64_t k, int64_t repeats, int64_t copies);

// The same for weight_only_linear: bits 8, or 4 (symmetric) with a group.
FASTSPARSE_API double time_weight_only_linear(int64_t m, int64_t n, int64_t k, int64_t bits, int64_t group,
                                              int64_t repeats, int64_t copies);

// Bench hook of kl_loss: seconds per forward with gradient, float32, into memory that is there.
FASTSPARSE_API double time_kl_div(int64_t rows, int64_t classes, int64_t repeats);

// The same for sparse_matmul: a weight with `density` of its elements not zero, in one of the formats 2, 3, 4.
FASTSPARSE_API double time_sparse_linear(int64_t m, int64_t n, int64_t k, double density, int64_t format,
                                         int64_t repeats, int64_t copies);

}  // namespace fs
