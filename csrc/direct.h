// The short way of a call: from Python to a family's launcher without torch's dispatcher, for what most calls are:
// plain tensors on the CPU, nothing to record, no argument that is wrong. `_C` (direct_module.cpp) sees to the first
// two, a family to the last. Whatever is not so is answered with false before anything is done, and takes the way of
// the op, which has the checks and their messages (docs/decisions/0011-short-calls.md). Torch-free.
#pragma once
#include <cstdint>

#include "runtime/export.h"
#include "runtime/view.h"

namespace fs::direct {

// What a family asks of the caller.
class Host {
 public:
  // A new y[..., n] with the rows of x, and where it lies; false: not this way.
  virtual bool allocate(const View& x, int64_t n, Element type, void** data) = 0;
  // Round the kernel, if it takes long enough for other threads of Python to want to run.
  virtual void unlock() = 0;
  virtual void lock() = 0;

  template <class F>
  void run(int64_t products, const F& kernel) {
    constexpr int64_t kShort = 1 << 16;  // a microsecond or two
    if (products <= kShort) return kernel();
    unlock();
    try {
      kernel();
    } catch (...) {
      lock();
      throw;
    }
    lock();
  }

 protected:
  ~Host() = default;
};

inline bool is_activation(int64_t code) { return 0 <= code && code <= 3; }

// The arguments of the ops of these names, a missing tensor null. False: not this way.
FASTSPARSE_API bool int8_linear(Host& host, const View& x, const View& weight, const View& weight_scale,
                                const View* bias, int64_t activation);
FASTSPARSE_API bool int8_mm(Host& host, const View& a, const View& b);
FASTSPARSE_API bool weight_only_linear(Host& host, const View& x, const View& weight, const View* weight_scale,
                                       const View* bias, int64_t n, int64_t activation);
FASTSPARSE_API bool sparse_linear(Host& host, const View& x, const View& weight, const View* bias, int64_t n,
                                  int64_t activation);
FASTSPARSE_API bool sparse_int8_linear(Host& host, const View& x, const View& weight, const View& weight_scale,
                                       const View* bias, int64_t activation);

}  // namespace fs::direct
