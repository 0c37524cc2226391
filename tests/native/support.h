// What the torch-free tests share: torch's thread pool stood in for, random numbers, guarded memory.
#pragma once
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/runtime/parallel.h"

namespace fs {  // the stand-in of runtime/parallel.cpp: two "threads", one after the other
int num_threads() { return 2; }
void parallel_for_raw(int64_t count, RangeFn fn, void* context) {
  fn(0, count / 2, context);
  fn(count / 2, count, context);
}
}  // namespace fs

namespace {

std::mt19937 generator;

int64_t uniform(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
int64_t pick(std::initializer_list<int64_t> values) {
  return values.begin()[uniform(0, static_cast<int64_t>(values.size()) - 1)];
}

// `bytes` of memory, aligned to 64 or off by `shift`, between margins of one byte value.
struct Guarded {
  static constexpr size_t kMargin = 256;
  std::vector<uint8_t> all;
  size_t bytes, begin;
  uint8_t fill;
  Guarded(size_t size, uint8_t fill, int64_t shift = 0) : all(size + 2 * kMargin + 128, fill), bytes(size), fill(fill) {
    const size_t address = reinterpret_cast<uintptr_t>(all.data()) + kMargin;
    begin = kMargin + (64 - address % 64) % 64 + static_cast<size_t>(shift);
  }
  uint8_t* data() { return all.data() + begin; }
  bool margins_intact() const {
    for (size_t i = 0; i < all.size(); ++i)
      if ((i < begin || i >= begin + bytes) && all[i] != fill) return false;
    return true;
  }
};

int failures = 0;
template <class Kernels>
void fail(const Kernels& row, const std::string& what) {
  std::printf("FAILED %s: %s\n", row.name, what.c_str());
  ++failures;
}

}  // namespace
