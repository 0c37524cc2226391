#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <deque>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the CPU stand-in switches stacks by x86-64 instructions"
#endif

// void fs_switch_stack(void** save, void* load): keeps the registers that a callee must keep. It leaves by a jump, as
// a `ret` to another place than the last `call` costs a mispredicted branch.
extern "C" void fs_switch_stack(void** save, void* load);
asm(R"(
.text
.hidden fs_switch_stack
.globl fs_switch_stack
.type fs_switch_stack, @function
fs_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size fs_switch_stack, .-fs_switch_stack
)");

namespace fs::simt {
namespace {

constexpr size_t kGuardBytes = 4096;

std::deque<Fiber> pool;  // a deque: fibers stay where they are
Fiber launcher;
#if defined(__SANITIZE_ADDRESS__)
const void* launcher_bottom = nullptr;
size_t launcher_bytes = 0;
Fiber* left = nullptr;  // whom the running fiber was switched from
#endif

}  // namespace

Fiber& main_fiber() { return launcher; }

Fiber& prepare_fiber(size_t index, void (*entry)()) {
  while (pool.size() <= index) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuardBytes, PROT_NONE);
    pool.emplace_back();
    pool.back().stack = static_cast<char*>(memory) + kGuardBytes;
  }
  Fiber& fiber = pool[index];
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // an abandoned stack is full of red zones
#endif
  // From below: six registers, the address to jump to, and a return address (none) at 8 modulo 16, as after a call.
  // Each begins some cache lines off the others: at one offset in their pages they would share a few sets of the
  // caches.
  auto* top = reinterpret_cast<uint64_t*>(fiber.stack + kStackBytes - 64 * (1 + index * 5 % 61)) - 1;
  *top = 0;
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber.saved = top;
  fiber.fake_stack = nullptr;
  return fiber;
}

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool ended) {
#if defined(__SANITIZE_ADDRESS__)
  const bool to_launcher = &to == &launcher;
  left = &from;
  __sanitizer_start_switch_fiber(ended ? nullptr : &from.fake_stack, to_launcher ? launcher_bottom : to.stack,
                                 to_launcher ? launcher_bytes : kStackBytes);
#endif
  fs_switch_stack(&from.saved, to.saved);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void fiber_begun([[maybe_unused]] Fiber& self) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(self.fake_stack, &bottom, &bytes);
  if (left == &launcher) {
    launcher_bottom = bottom;
    launcher_bytes = bytes;
  }
#endif
}

}  // namespace fs::simt
