// Pages of 2 MB for what is read again and again, such as packed weights. Torch-free.
#pragma once
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fs {

// Asks for huge pages in [p, p + bytes), as far as whole ones lie in it; to be called before it is first written. A
// wish: where the system knows none, nothing happens. A weight of 16 MB in pages of 4 KB exceeds what the TLB holds,
// and hardware prefetchers stop at a page's end: read bandwidth beyond L2 doubles (docs/kernels/int8_gemm.md).
inline void advise_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p;
  (void)bytes;
#endif
}

}  // namespace fs
