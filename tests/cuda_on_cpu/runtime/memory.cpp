#include "memory.h"

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <stdexcept>

#include "shadow.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define FS_POISON(p, n) __asan_poison_memory_region(p, n)
#define FS_UNPOISON(p, n) __asan_unpoison_memory_region(p, n)
#else
#define FS_POISON(p, n) static_cast<void>(0)
#define FS_UNPOISON(p, n) static_cast<void>(0)
#endif

namespace fs::simt {

char* arena = nullptr;

namespace {

size_t global_end = 0, shared_end = 0;  // offsets in the arena

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

void* open(size_t begin, size_t bytes) {
  char* p = arena + begin;
  FS_UNPOISON(p, bytes);
  std::memset(p, 0xff, bytes);
  shadow::allocated(p, bytes);
  return p;
}

}  // namespace

char* the_arena() {
  if (arena != nullptr) return arena;
  void* memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  arena = static_cast<char*>(memory);
  FS_POISON(arena, kArenaBytes);
  shadow::reserve();
  global_end = kSharedBytes;
  return arena;
}

void* allocate_global(size_t bytes, size_t offset) {
  the_arena();
  const size_t begin = round_up(global_end + kRedZone, 256) + offset;
  if (begin + bytes + kRedZone > kArenaBytes) throw std::runtime_error("the stand-in's global memory is full");
  global_end = begin + bytes;
  return open(begin, bytes);
}

void free_all_global() {
  if (arena == nullptr || global_end <= kSharedBytes) return;
  FS_POISON(arena + kSharedBytes, global_end - kSharedBytes);
  shadow::freed(arena + kSharedBytes, global_end - kSharedBytes);
  global_end = kSharedBytes;
}

void reset_shared() {
  the_arena();
  if (shared_end > 0) {
    FS_POISON(arena, shared_end);
    shadow::freed(arena, shared_end);
  }
  shared_end = 0;
}

void* allocate_shared(size_t bytes, size_t alignment) {
  const size_t begin = round_up(shared_end + (shared_end > 0 ? kRedZone : 0), alignment);
  if (begin + bytes > kSharedBytes) throw std::bad_alloc();
  shared_end = begin + bytes;
  return open(begin, bytes);
}

}  // namespace fs::simt
