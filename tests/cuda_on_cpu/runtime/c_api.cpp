// What Python calls of the stand-in itself. Functions that can fail return a text, or null.
#include <dlfcn.h>

#include "banks.h"
#include "entry.h"
#include "memory.h"
#include "runtime.h"
#include "shadow.h"

namespace {
std::string message;
}

const char* fs::simt::kept(const std::string& text) {
  message = text;
  return message.c_str();
}

extern "C" {

FS_ENTRY void simt_set_seed(unsigned seed) { fs::simt::set_seed(seed); }

FS_ENTRY void* simt_allocate(size_t bytes, size_t offset) {
  try {
    return fs::simt::allocate_global(bytes, offset);
  } catch (const std::exception&) {
    return nullptr;
  }
}
FS_ENTRY void simt_free_all() { fs::simt::free_all_global(); }
FS_ENTRY void simt_initialised(void* p, size_t bytes) { fs::simt::shadow::initialised(p, bytes); }

// "OFFSET COUNT" lines: the kernels launched without a finding since the last call, by their place in this library.
FS_ENTRY const char* simt_launches() {
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(&simt_launches), &info);
  std::string text;
  for (const auto& [kernel, count] : fs::simt::launches)
    text += std::to_string(static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase)) + " " +
            std::to_string(count) + "\n";
  fs::simt::launches.clear();
  return fs::simt::kept(text);
}

// Extra passes over shared memory since the last call: all in the race build, ldmatrix's in the others.
FS_ENTRY int64_t simt_bank_conflicts() {
  const int64_t n = fs::simt::ldmatrix_conflicts + fs::simt::banks::take_extra_passes();
  fs::simt::ldmatrix_conflicts = 0;
  return n;
}
// Where, for those of the last simt_bank_conflicts(), in the race build.
FS_ENTRY const char* simt_conflict_places() { return fs::simt::kept(fs::simt::banks::places()); }
}
