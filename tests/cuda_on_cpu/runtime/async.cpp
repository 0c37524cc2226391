// cp.async: the payload was read at issue, and lands where the issuing thread waits for it. A wait that is too weak
// leaves the 0xff there, whatever the build.
#include <cstring>

#include "memory.h"
#include "runtime.h"
#include "shadow.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fs::simt {
namespace {

// AddressSanitizer marks eight bytes at a time, so four-byte copies stay unmarked.
void mark(void* p, size_t bytes, bool on) {
  shadow::pending(p, bytes, on);
#if defined(__SANITIZE_ADDRESS__)
  if (bytes >= 8) on ? __asan_poison_memory_region(p, bytes) : __asan_unpoison_memory_region(p, bytes);
#endif
}

}  // namespace

void issue_async(void* target, const void* payload, size_t bytes) {
  const void* pc = __builtin_return_address(0);
  if (!in_shared(target))
    fail("ptx::cp_async at " + place(pc) + " by " + thread_name(running_number()) +
         ": the target is not shared memory");
  AsyncCopy copy{target, pc, static_cast<uint8_t>(bytes), {}};
  std::memcpy(copy.payload, payload, bytes);
  running->open_group.push_back(copy);
  mark(target, bytes, true);
}

void commit_async() {
  running->groups.push_back(std::move(running->open_group));
  running->open_group.clear();
}

void wait_async(int groups_left) {
  auto& groups = running->groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    for (const AsyncCopy& copy : groups.front()) {
      mark(copy.target, copy.bytes, false);
      std::memcpy(copy.target, copy.payload, copy.bytes);
      shadow::access(copy.target, copy.bytes, shadow::Kind::write, copy.pc);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace fs::simt
