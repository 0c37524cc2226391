// What the files of the stand-in know of each other: the running block, its threads, findings.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "../../../csrc/runtime/cuda/simt.h"
#include "fiber.h"

namespace fs::simt {

constexpr int kMaxThreads = 1024;

enum class State : uint8_t { ready, in_warp_operation, at_barrier, exited };

struct Wait {  // where a thread waits, and for what
  const char* name = nullptr;
  At at{};
  unsigned mask = 0;
  WarpFunction function = nullptr;
  void* argument = nullptr;
};

struct AsyncCopy {
  void* target;
  const void* pc;
  uint8_t bytes;
  unsigned char payload[16];
};

struct Thread {
  Fiber* fiber = nullptr;
  State state = State::exited;
  uint3 index{};
  Wait wait;
  std::vector<AsyncCopy> open_group;           // cp.async not committed yet
  std::vector<std::vector<AsyncCopy>> groups;  // committed, oldest first
  uint32_t clock = 1;                          // of its accesses; goes up where it synchronises
  uint32_t released = 0;                       // its clock at the last block barrier: what lies before is ordered
  std::array<uint32_t, 32> seen{};             // by __syncwarp: the clocks of the lanes of its warp
};

struct Meeting {  // a warp operation that some lanes have come to
  unsigned mask, arrived;
  WarpFunction function;
  At at;
  void* arguments[32];
};

struct Block {
  unsigned serial = 0;        // of all blocks of all launches
  unsigned launch_first = 0;  // the serial of this launch's first block
  unsigned count = 0;         // threads
  unsigned alive = 0;
  std::vector<Thread> threads;
  std::vector<std::vector<Meeting>> meetings;         // by warp
  std::vector<std::pair<const void*, void*>> shared;  // tag, array
  size_t static_shared = 0;
  void* dynamic_shared = nullptr;
  std::string deferred;  // a finding that waits for a better one to the end of the block
  int barrier_arrived = 0, barrier_true = 0, barrier_result = 0;
};

extern Block block;
extern Thread* running;  // null outside a kernel

inline unsigned running_number() { return static_cast<unsigned>(running - block.threads.data()); }
std::string place(At at);                  // "file:line"
std::string place(const void* pc);         // of the call before pc: "file:line", with the lines it is inlined into
std::string thread_name(unsigned number);  // "block (1,0,0) thread (37,0,0)"

// Ends the launch with this report. Called from a kernel's thread; what it was doing is abandoned.
[[noreturn]] void fail(const std::string& report);

void set_seed(unsigned seed);

// Extra passes over shared memory that ldmatrix needed since the last call; in the race build banks.h counts them.
extern int64_t ldmatrix_conflicts;

// How often each kernel ran without a finding since the last call.
extern std::map<const void*, int64_t> launches;

}  // namespace fs::simt
