// The kernel's own time, for every family's timing.cpp.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdint>

#include "huge_pages.h"
#include "workspace.h"

namespace fs {

// Room for a pack, where ops.pack would put it.
inline AlignedBytes allocate_pack(int64_t bytes) {
  AlignedBytes pack = allocate_aligned(static_cast<size_t>(bytes));
  advise_huge_pages(pack.get(), bytes);
  return pack;
}

// Floats where torch would put a tensor's: vectors that cross cache lines are slower.
inline AlignedBytes allocate_floats(int64_t count, float value) {
  AlignedBytes bytes = allocate_aligned(static_cast<size_t>(count) * sizeof(float));
  std::fill_n(reinterpret_cast<float*>(bytes.get()), count, value);
  return bytes;
}

// Seconds a call: calls(count) makes so many; `warm` of them come first and are not counted.
template <class Calls>
double seconds_a_call(int64_t warm, int64_t repeats, const Calls& calls) {
  calls(warm);
  const auto begin = std::chrono::steady_clock::now();
  calls(repeats);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
  return elapsed.count() / static_cast<double>(repeats);
}

}  // namespace fs
