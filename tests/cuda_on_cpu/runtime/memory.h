// Device memory: one reserved range of addresses, so that "is this device memory?" is one comparison. Shared memory of
// the running block lies at its begin, global memory behind it, every allocation between red zones.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fs::simt {

constexpr size_t kSharedBytes = size_t{1} << 20;
constexpr size_t kArenaBytes = size_t{1} << 28;
constexpr size_t kRedZone = 256;

extern char* arena;  // null until the first use

char* the_arena();
inline bool in_arena(const void* p) {
  return static_cast<size_t>(static_cast<const char*>(p) - arena) < kArenaBytes && arena != nullptr;
}
inline bool in_shared(const void* p) {
  return static_cast<size_t>(static_cast<const char*>(p) - arena) < kSharedBytes && arena != nullptr;
}

// Global memory at `offset` bytes behind a multiple of 256; filled with 0xff, and uninitialised for the race build.
void* allocate_global(size_t bytes, size_t offset);
void free_all_global();

// Shared memory of the block that begins now: none yet, then one allocation after the other.
void reset_shared();
void* allocate_shared(size_t bytes, size_t alignment);

}  // namespace fs::simt
