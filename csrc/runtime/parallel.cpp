#include "parallel.h"

#include <torch/csrc/stable/ops.h>

namespace fs {

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void parallel_for_raw(int64_t count, RangeFn fn, void* context) {
  torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) { fn(begin, end, context); });
}

}  // namespace fs
