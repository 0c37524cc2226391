// Places in sources: of a call with At, or of an instruction by addr2line.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "runtime.h"

namespace fs::simt {

std::string place(At at) { return std::string(at.file) + ":" + std::to_string(at.line); }

// The wrappers of csrc/runtime/cuda are inlined into the kernel: the line meant is the first outside of them, and
// behind it those of the functions that it is inlined into.
std::string place(const void* pc) {
  Dl_info info{};
  if (dladdr(pc, &info) == 0 || info.dli_fname == nullptr) return "an unknown place";
  char command[4096];
  const auto offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1;  // in the call
  std::snprintf(command, sizeof command, "LD_PRELOAD= addr2line -i -e '%s' 0x%zx", info.dli_fname,
                static_cast<size_t>(offset));
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return "an unknown place";
  std::string text, wrapper;
  char line[1024];
  while (std::fgets(line, sizeof line, pipe) != nullptr) {
    line[std::strcspn(line, " \n")] = 0;  // without "(discriminator 3)"
    const char* name = line;
    if (const char* root = std::strstr(line, "csrc/"); root != nullptr) name = root;
    if (const char* root = std::strstr(line, "tests/cuda_on_cpu/"); root != nullptr) name = root;
    if (std::strstr(name, "runtime/cuda/") != nullptr) {
      wrapper = name;
      continue;
    }
    text += (text.empty() ? "" : " < ") + std::string(name);
  }
  pclose(pipe);
  return text.empty() ? (wrapper.empty() ? "an unknown place" : wrapper) : text;
}

}  // namespace fs::simt
