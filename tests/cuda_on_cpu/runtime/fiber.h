// Fibers: one for each thread of a block, each with a stack of its own; a switch is a few instructions (x86-64 only).
#pragma once
#include <cstddef>

namespace fs::simt {

struct Fiber {
  void* saved = nullptr;       // its stack pointer while another runs
  char* stack = nullptr;       // lowest address
  void* fake_stack = nullptr;  // AddressSanitizer's
};

constexpr size_t kStackBytes = 128 * 1024;

// A fiber of the pool, ready to run entry() on an empty stack. It never returns from entry().
Fiber& prepare_fiber(size_t index, void (*entry)());

// Leaves `from` for `to`; returns when somebody switches back to `from`. `ended`: nobody will.
void switch_fiber(Fiber& from, Fiber& to, bool ended = false);

// The first thing that runs on a fiber's stack.
void fiber_begun(Fiber& self);

// The stack on which the launcher runs.
Fiber& main_fiber();

inline bool on_stack(const Fiber& fiber, const void* p) {
  return static_cast<size_t>(static_cast<const char*>(p) - fiber.stack) < kStackBytes;
}

}  // namespace fs::simt
