// Scratch memory per thread: grows to what was asked and is kept, so that a warm call allocates nothing.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace fs {

inline constexpr size_t kCacheLine = 64;

struct AlignedDelete {
  void operator()(uint8_t* p) const { ::operator delete[](p, std::align_val_t{kCacheLine}); }
};

using AlignedBytes = std::unique_ptr<uint8_t[], AlignedDelete>;

inline std::atomic<int64_t>& allocation_count() {  // a test reads it
  static std::atomic<int64_t> count{0};
  return count;
}

inline AlignedBytes allocate_aligned(size_t bytes) {
  allocation_count().fetch_add(1, std::memory_order_relaxed);
  return AlignedBytes(new (std::align_val_t{kCacheLine}) uint8_t[bytes]);
}

// At least `bytes` of this thread's scratch, aligned to 64; valid until the thread asks for the same slot again. What a
// caller hands to all threads of a parallel_for lies in slot 1: it runs parts itself, and they use slot 0.
template <int kSlot = 0>
inline uint8_t* scratch(size_t bytes) {
  thread_local AlignedBytes buffer;
  thread_local size_t size = 0;
  if (bytes > size) {
    buffer.reset();
    size = 0;
    buffer = allocate_aligned(bytes);
    size = bytes;
  }
  return buffer.get();
}

}  // namespace fs
