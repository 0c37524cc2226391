// What `_C` asks of torch where it calls a kernel itself (direct.h). Torch-free.
#pragma once
#include <cstdint>

#include "export.h"
#include "view.h"

namespace fs {

// A new contiguous tensor of a float type or s32 on the CPU, as an owning at::Tensor*, and its memory; null if there is
// none.
FASTSPARSE_API void* new_result(const int64_t* sizes, int dims, Element type, void** data);
FASTSPARSE_API void free_result(void* tensor);  // gives up this reference

FASTSPARSE_API bool is_grad_enabled();

}  // namespace fs
