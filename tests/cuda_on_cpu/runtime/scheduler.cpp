// Blocks one after another, the threads of a block as fibers; a fiber runs until it waits. Barriers and warp
// operations.
#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>

#include <ucontext.h>

#include "banks.h"
#include "memory.h"
#include "runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fs::simt {

Block block;
Thread* running = nullptr;
int64_t ldmatrix_conflicts = 0;
std::map<const void*, int64_t> launches;

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
unsigned seed = 0;
std::minstd_rand generator;
std::vector<unsigned> ready;  // a ring: first in, first out
size_t ready_first = 0;
void (*kernel_call)(void*) = nullptr;
void* kernel_closure = nullptr;
std::string finding;

unsigned random_below(size_t n) { return static_cast<unsigned>(generator() % n); }

void make_ready(unsigned number) {
  block.threads[number].state = State::ready;
  ready.push_back(number);
}

bool any_ready() { return ready_first < ready.size(); }

unsigned take_ready() {
  if (seed != 0) std::swap(ready[ready_first], ready[ready_first + random_below(ready.size() - ready_first)]);
  const unsigned number = ready[ready_first++];
  if (ready_first > 4096) {
    ready.erase(ready.begin(), ready.begin() + static_cast<std::ptrdiff_t>(ready_first));
    ready_first = 0;
  }
  return number;
}

void enter(unsigned number) {
  running = &block.threads[number];
  threadIdx = running->index;
}

std::string lanes_text(unsigned lanes) {
  std::string text;
  for (int first = 0; first < 32; ++first) {
    if (!(lanes >> first & 1)) continue;
    int last = first;
    while (last + 1 < 32 && (lanes >> (last + 1) & 1)) ++last;
    text += (text.empty() ? "" : ",") + std::to_string(first);
    if (last > first) text += "-" + std::to_string(last);
    first = last;
  }
  return text;
}

// Per warp and per place: which lanes wait there.
std::string who_waits() {
  std::string text;
  for (unsigned warp = 0; warp * 32 < block.count; ++warp) {
    unsigned named = 0;
    for (unsigned i = warp * 32; i < std::min(block.count, warp * 32 + 32); ++i) {
      const Thread& t = block.threads[i];
      if (named >> (i % 32) & 1 || (t.state != State::in_warp_operation && t.state != State::at_barrier)) continue;
      unsigned lanes = 0;
      for (unsigned j = warp * 32; j < std::min(block.count, warp * 32 + 32); ++j) {
        const Thread& other = block.threads[j];
        if (other.state == t.state && other.wait.at.line == t.wait.at.line && other.wait.name == t.wait.name)
          lanes |= 1u << (j % 32);
      }
      named |= lanes;
      text += "\n  warp " + std::to_string(warp) + ": lanes " + lanes_text(lanes) + " wait in " + t.wait.name + " at " +
              place(t.wait.at);
    }
  }
  return text;
}

bool same_place(At a, At b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

std::string what_runs() {
  return std::string(running->wait.name) + " at " + place(running->wait.at) + " by " + thread_name(running_number());
}

// Before the first lane of a warp operation waits for the others of its mask: can they come?
void check_mask(unsigned mask, unsigned first, const std::vector<Meeting>& meetings) {
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    if (first + l >= block.count)
      fail("exited lane in mask: " + what_runs() + " names lane " + std::to_string(l) +
           ", which the block does not have");
    if (block.threads[first + l].state == State::exited)
      fail("exited lane in mask: " + what_runs() + " names lane " + std::to_string(l) + ", which has exited");
  }
  const unsigned me = 1u << running_number() % 32;
  for (const Meeting& m : meetings) {
    if (!(m.mask & me) || !(m.arrived & mask)) continue;
    const unsigned other = static_cast<unsigned>(__builtin_ctz(m.arrived & mask));
    const Wait& wait = block.threads[first + other].wait;
    fail("lanes of one mask in different operations: " + what_runs() + " waits for lane " + std::to_string(other) +
         ", which is in " + wait.name + " at " + place(wait.at) + " and waits for it");
  }
}

// The running thread can't go on: to the next one that can, or back to the launcher.
void wait_for_others() {
  Thread* self = running;
  if (any_ready()) {
    const unsigned next = take_ready();
    if (&block.threads[next] == self) return;
    enter(next);
    switch_fiber(*self->fiber, *running->fiber, self->state == State::exited);
  } else {
    switch_fiber(*self->fiber, main_fiber(), self->state == State::exited);
  }
}

void finish_barrier() {
  block.barrier_result = block.barrier_true;
  block.barrier_arrived = block.barrier_true = 0;
  for (unsigned i = 0; i < block.count; ++i) {
    Thread& t = block.threads[i];
    t.released = t.clock++;
    if (t.state == State::at_barrier) make_ready(i);
  }
  for (unsigned warp = 0; warp * 32 < block.count; ++warp) banks::met(warp);
}

void thread_main() {
  fiber_begun(*running->fiber);
  kernel_call(kernel_closure);
  const unsigned number = running_number(), lane = number % 32;
  running->state = State::exited;
  --block.alive;
  for (unsigned i = number / 32 * 32; i < std::min(block.count, number / 32 * 32 + 32); ++i) {
    const Thread& t = block.threads[i];
    if (t.state == State::in_warp_operation && t.wait.mask >> lane & 1)
      fail("exited lane in mask: " + std::string(t.wait.name) + " at " + place(t.wait.at) + " by " + thread_name(i) +
           " names lane " + std::to_string(lane) + ", which has exited");
  }
  if (block.barrier_arrived > 0 && block.barrier_arrived == static_cast<int>(block.alive)) finish_barrier();
  wait_for_others();
  std::abort();  // nobody runs an ended fiber
}

// A wild address in a kernel ends the launch and not the process; AddressSanitizer has a handler of its own.
sigjmp_buf segv_jump;
void *segv_address = nullptr, *segv_pc = nullptr;
#if defined(__SANITIZE_ADDRESS__)
void guard_signals(bool) {}
#else
struct sigaction old_segv, old_bus;
volatile bool guarding = false;
alignas(16) char signal_stack[64 * 1024];
void on_segv(int, siginfo_t* info, void* context) {
  if (!guarding) {
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    return;
  }
  guarding = false;
  segv_address = info->si_addr;
  segv_pc = reinterpret_cast<char*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]) + 1;
  siglongjmp(segv_jump, 1);
}
void guard_signals(bool on) {
  if (!on) {
    guarding = false;
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    return;
  }
  stack_t alternative{};
  alternative.ss_sp = signal_stack;
  alternative.ss_size = sizeof signal_stack;
  sigaltstack(&alternative, nullptr);
  struct sigaction action{};
  action.sa_sigaction = &on_segv;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  guarding = true;
}
#endif

void run_block(dim3 shape, size_t shared_bytes) {
  block.count = shape.x * shape.y * shape.z;
  block.alive = block.count;
  block.threads.resize(block.count);
  block.shared.clear();
  block.static_shared = 0;
  block.deferred.clear();
  block.barrier_arrived = block.barrier_true = 0;
  block.meetings.resize((block.count + 31) / 32);
  for (auto& meetings : block.meetings) meetings.clear();
  reset_shared();
  banks::begin_block();
  block.dynamic_shared = shared_bytes > 0 ? allocate_shared(shared_bytes, 1024) : nullptr;
  ready.clear();
  ready_first = 0;
  for (unsigned i = 0; i < block.count; ++i) {
    Thread& t = block.threads[i];
    t.fiber = &prepare_fiber(i, &thread_main);
    t.index = {i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y)};
    t.open_group.clear();
    t.groups.clear();
    t.clock = 1;
    t.released = 0;
    t.seen.fill(0);
    make_ready(i);
  }
  enter(take_ready());
  switch_fiber(main_fiber(), *running->fiber);
  if (finding.empty() && block.alive > 0)
    finding = "deadlock: " + std::to_string(block.alive) + " of " + std::to_string(block.count) +
              " threads wait for others that do not come" + who_waits();
  if (finding.empty()) finding = block.deferred;
  banks::end_block();
}

}  // namespace

void set_seed(unsigned s) {
  seed = s;
  generator.seed(s + 1);
}

std::string thread_name(unsigned number) {
  const uint3 t = block.threads[number].index;
  char text[96];
  std::snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z, t.x, t.y,
                t.z);
  return text;
}

void fail(const std::string& report) {
  finding = block.deferred.empty() ? report : report + "\n  and before that: " + block.deferred;
  switch_fiber(*running->fiber, main_fiber(), true);
  std::abort();
}

void run(const void* kernel, dim3 grid, dim3 shape, size_t shared_bytes, void (*call)(void*), void* closure) {
  if (running != nullptr) throw std::runtime_error("a kernel launches a kernel");
  const size_t threads = size_t{1} * shape.x * shape.y * shape.z;
  if (threads == 0 || threads > kMaxThreads || shape.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535 || shared_bytes > 163 * 1024)
    throw std::runtime_error("launch of a kernel: invalid configuration: grid (" + std::to_string(grid.x) + "," +
                             std::to_string(grid.y) + "," + std::to_string(grid.z) + "), block (" +
                             std::to_string(shape.x) + "," + std::to_string(shape.y) + "," + std::to_string(shape.z) +
                             "), dynamic shared memory " + std::to_string(shared_bytes));
  blockDim = shape;
  gridDim = grid;
  kernel_call = call;
  kernel_closure = closure;
  finding.clear();
  const size_t blocks = size_t{1} * grid.x * grid.y * grid.z;
  std::vector<size_t> order(blocks);
  std::iota(order.begin(), order.end(), size_t{0});
  if (seed != 0) std::shuffle(order.begin(), order.end(), generator);
  block.launch_first = block.serial + 1;
  guard_signals(true);
  if (sigsetjmp(segv_jump, 1) == 0) {
    for (size_t i : order) {
      ++block.serial;
      blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                  static_cast<unsigned>(i / grid.x / grid.y)};
      run_block(shape, shared_bytes);
      if (!finding.empty()) break;
    }
  } else {
    char address[32];
    std::snprintf(address, sizeof address, "%p", segv_address);
    finding = "segmentation fault: address " + std::string(address) + " by " + thread_name(running_number()) + " at " +
              place(segv_pc);
  }
  guard_signals(false);
  running = nullptr;
  if (!finding.empty()) throw std::runtime_error(finding);
  ++launches[kernel];
}

void* shared_array(const void* tag, size_t bytes) {
  for (const auto& [known, p] : block.shared)
    if (known == tag) return p;
  block.static_shared += (bytes + 15) / 16 * 16;
  if (block.static_shared > 48 * 1024)
    fail("the static shared memory of a block is limited to 48 KB, this one asks for " +
         std::to_string(block.static_shared) + " bytes");
  void* p = allocate_shared(bytes, 16);
  block.shared.emplace_back(tag, p);
  return p;
}

void* dynamic_shared() {
  if (block.dynamic_shared == nullptr) fail("dynamic shared memory is used, the launch gives none");
  return block.dynamic_shared;
}

int barrier(const char* name, bool predicate, At at) {
  for (unsigned i = 0; block.barrier_arrived > 0 && i < block.count; ++i) {
    const Thread& t = block.threads[i];
    if (t.state != State::at_barrier) continue;
    if (!same_place(t.wait.at, at) || t.wait.name != name)
      fail("divergent barrier: " + thread_name(running_number()) + " is at " + name + " at " + place(at) + ", " +
           thread_name(i) + " at " + t.wait.name + " at " + place(t.wait.at));
    break;  // the others were compared when they came
  }
  running->wait = {name, at, 0, nullptr, nullptr};
  running->state = State::at_barrier;
  block.barrier_true += predicate;
  if (++block.barrier_arrived == static_cast<int>(block.alive)) finish_barrier();
  wait_for_others();
  return block.barrier_result;
}

void warp_operation(unsigned mask, const char* name, WarpFunction function, void* argument, At at) {
  const unsigned number = running_number(), lane = number % 32, first = number - lane;
  running->wait = {name, at, mask, function, argument};
  running->state = State::in_warp_operation;
  std::vector<Meeting>& meetings = block.meetings[number / 32];
  Meeting* meeting = nullptr;
  for (Meeting& m : meetings)
    if (m.mask == mask && m.function == function && same_place(m.at, at)) meeting = &m;
  if (meeting == nullptr) {
    check_mask(mask, first, meetings);
    meetings.push_back({mask, 0, function, at, {}});
    meeting = &meetings.back();
  }
  if (!(mask >> lane & 1)) fail("caller not in its mask: " + what_runs());
  meeting->arguments[lane] = argument;
  meeting->arrived |= 1u << lane;
  if (meeting->arrived != mask) return wait_for_others();
  const Meeting done = *meeting;
  meetings.erase(meetings.begin() + (meeting - meetings.data()));
  function(mask, done.arguments);
  if (mask == kAllLanes) banks::met(number / 32);
  // In order, the last to come goes on; else anybody.
  for (unsigned l = 0; l < 32; ++l)
    if (mask >> l & 1 && (l != lane || seed != 0)) make_ready(first + l);
  running->state = State::ready;
  if (seed != 0) wait_for_others();
}

}  // namespace fs::simt
