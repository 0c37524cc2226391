// parallel_for over torch's own thread pool: it obeys torch.set_num_threads. This header is torch-free.
#pragma once
#include <cstdint>

namespace fs {

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);

int num_threads();
void parallel_for_raw(int64_t count, RangeFn fn, void* context);

// Runs f(begin, end) over [0, count), at most one range a thread. The first exception of a range is thrown again.
template <class F>
void parallel_for(int64_t count, const F& f) {
  if (count <= 0) return;
  if (count == 1) return f(int64_t{0}, int64_t{1});
  parallel_for_raw(
      count, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&f));
}

}  // namespace fs
