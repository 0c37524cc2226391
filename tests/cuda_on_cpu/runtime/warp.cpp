// Shuffles, votes, reductions, __syncwarp.
#include <algorithm>

#include "runtime.h"

namespace fs::simt {
namespace {

struct ShuffleArgument {
  Shuffle kind;
  uint64_t value, result;
  int operand, width, from;  // from: the lane to read, filled in by the caller
};

struct VoteArgument {
  bool predicate;
  unsigned result;
};

struct ReduceArgument {
  Reduce kind;
  int64_t value;
};

// Lanes [begin, begin + width) share a segment.
int source_lane(Shuffle kind, int lane, int operand, int width) {
  const int begin = lane / width * width;
  switch (kind) {
    case Shuffle::index: return begin + (operand & (width - 1));
    case Shuffle::up: return lane - operand < begin ? lane : lane - operand;
    case Shuffle::down: return lane + operand >= begin + width ? lane : lane + operand;
    default: return (lane ^ operand) >= begin + width ? lane : lane ^ operand;
  }
}

}  // namespace

uint64_t shuffle(unsigned mask, Shuffle kind, uint64_t value, int operand, int width, At at) {
  constexpr const char* kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  const char* name = kNames[static_cast<int>(kind)];
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    fail(std::string(name) + " at " + place(at) + ": width must be a power of two up to 32, got " +
         std::to_string(width));
  const int lane = static_cast<int>(running_number() % 32);
  const int from = source_lane(kind, lane, operand, width);
  if (from < 0 || from > 31 || !(mask >> from & 1))
    fail("shuffle from outside: " + std::string(name) + " at " + place(at) + " by " + thread_name(running_number()) +
         " reads lane " + std::to_string(from) + ", which is not in its mask");
  ShuffleArgument argument{kind, value, 0, operand, width, from};
  warp_operation(
      mask, name,
      [](unsigned, void* const* all) {
        for (int l = 0; l < 32; ++l)
          if (all[l] != nullptr) {
            auto* mine = static_cast<ShuffleArgument*>(all[l]);
            mine->result = static_cast<ShuffleArgument*>(all[mine->from])->value;
          }
      },
      &argument, at);
  return argument.result;
}

unsigned ballot(unsigned mask, const char* name, bool predicate, At at) {
  VoteArgument argument{predicate, 0};
  warp_operation(
      mask, name,
      [](unsigned, void* const* all) {
        unsigned votes = 0;
        for (int l = 0; l < 32; ++l)
          if (all[l] != nullptr && static_cast<VoteArgument*>(all[l])->predicate) votes |= 1u << l;
        for (int l = 0; l < 32; ++l)
          if (all[l] != nullptr) static_cast<VoteArgument*>(all[l])->result = votes;
      },
      &argument, at);
  return argument.result;
}

int64_t reduce(unsigned mask, Reduce kind, int64_t value, At at) {
  constexpr const char* kNames[] = {"__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync"};
  ReduceArgument argument{kind, value};
  warp_operation(
      mask, kNames[static_cast<int>(kind)],
      [](unsigned, void* const* all) {
        bool first = true;
        int64_t result = 0;
        for (int l = 0; l < 32; ++l) {
          if (all[l] == nullptr) continue;
          const auto& a = *static_cast<ReduceArgument*>(all[l]);
          result = first                       ? a.value
                   : a.kind == Reduce::add     ? result + a.value
                   : a.kind == Reduce::minimum ? std::min(result, a.value)
                                               : std::max(result, a.value);
          first = false;
        }
        for (int l = 0; l < 32; ++l)
          if (all[l] != nullptr) static_cast<ReduceArgument*>(all[l])->value = result;
      },
      &argument, at);
  return argument.value;
}

}  // namespace fs::simt

// The one warp operation that orders memory: each lane of the mask then knows what the others knew.
void __syncwarp(unsigned mask, fs::simt::At at) {
  using namespace fs::simt;
  warp_operation(
      mask, "__syncwarp",
      [](unsigned, void* const* all) {
        std::array<uint32_t, 32> merged{};
        for (int l = 0; l < 32; ++l) {
          if (all[l] == nullptr) continue;
          auto* t = static_cast<Thread*>(all[l]);
          for (int i = 0; i < 32; ++i) merged[i] = std::max(merged[i], t->seen[i]);
          merged[l] = std::max(merged[l], t->clock);
          ++t->clock;
        }
        for (int l = 0; l < 32; ++l)
          if (all[l] != nullptr) static_cast<Thread*>(all[l])->seen = merged;
      },
      running, at);
}
