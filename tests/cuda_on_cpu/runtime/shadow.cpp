#include "shadow.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <cstring>
#include <new>

#include "banks.h"
#include "memory.h"
#include "runtime.h"

namespace fs::simt {

void check_alignment(const void* p, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail("misaligned: " + std::string(what) + " at " + place(__builtin_return_address(0)) + " by " +
         thread_name(running_number()) + ": the address must be a multiple of " + std::to_string(bytes));
}

uint64_t atomic_read(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail("misaligned: an atomic operation at " + place(__builtin_return_address(0)) + " by " +
         thread_name(running_number()));
  shadow::access(p, bytes, shadow::Kind::atomic, __builtin_return_address(0));
  uint64_t bits = 0;
  std::memcpy(&bits, p, bytes);
  return bits;
}
void atomic_write(void* p, size_t bytes, uint64_t bits) { std::memcpy(p, &bits, bytes); }

namespace shadow {

#if !defined(FS_SIMT_RACE)

void reserve() {}
void allocated(void*, size_t) {}
void freed(void*, size_t) {}
void initialised(void*, size_t) {}
void pending(void*, size_t, bool) {}
void access(const void*, size_t, Kind, const void*) {}

#else

namespace {

// Who touched a word; block 0 is nobody.
struct Access {
  uint32_t block;
  uint32_t clock;
  uint32_t pc;  // behind the library's base
  uint16_t thread;
  uint8_t bytes;  // one bit a byte
  uint8_t atomic;
};

// The last writers and readers, different threads each.
struct Word {
  Access write[2], read[2];
};
static_assert(sizeof(Word) == 64, "a cache line");

struct Flags {  // one bit a byte
  uint8_t valid, initialised, pending, unused;
};

constexpr size_t kWords = kArenaBytes / 4;
Word* words = nullptr;
Flags* flags = nullptr;
const char *base = nullptr, *base_end = nullptr;  // of this library in memory

size_t index_of(const void* p) { return static_cast<size_t>(static_cast<const char*>(p) - arena) / 4; }

// Calls body(index of the word, bits of its bytes) for the words that [p, p + bytes) touches.
template <class Body>
inline void for_words(const void* p, size_t bytes, const Body& body) {
  const auto address = static_cast<size_t>(static_cast<const char*>(p) - arena);
  size_t at = address;
  const size_t end = address + bytes;
  while (at < end) {
    const size_t next = at / 4 * 4 + 4, stop = next < end ? next : end;
    body(at / 4, static_cast<uint8_t>(((1u << (stop - at)) - 1) << (at % 4)));
    at = stop;
  }
}

bool ordered(const Access& a, unsigned me, const Thread& t) {
  if (a.block < block.launch_first) return true;  // an earlier launch, or nobody
  if (a.block != block.serial) return false;
  if (a.thread == me) return true;
  if (a.clock <= block.threads[a.thread].released) return true;
  return a.thread / 32 == me / 32 && a.clock <= t.seen[a.thread % 32];
}

std::string who(const Access& a) {
  std::string name = "thread " + std::to_string(a.thread);
  return (a.block == block.serial ? name : name + " of another block") + " at " + place(base + a.pc);
}

std::string sentence(const char* what, const void* p, Kind kind, const void* pc, const Access* other,
                     const char* other_did) {
  constexpr const char* kKinds[] = {"read", "write", "atomic operation"};
  std::string text = std::string(what) + ": " + kKinds[static_cast<int>(kind)] + " of " +
                     (in_shared(p) ? "shared" : "global") + " memory by " + thread_name(running_number()) + " at " +
                     place(pc);
  if (other != nullptr) text += "\n  " + std::string(other_did) + " by " + who(*other);
  return text;
}

[[noreturn]] __attribute__((noinline)) void report(const char* what, const void* p, Kind kind, const void* pc,
                                                   const Access* other, const char* other_did) {
  fail(sentence(what, p, kind, pc, other, other_did));
}

// Not the end yet: if the write that should have come first comes later, the two are a race, and both lines are known.
__attribute__((noinline)) void report_uninitialised(const void* p, Kind kind, const void* pc) {
  if (block.deferred.empty()) block.deferred = sentence("uninitialised", p, kind, pc, nullptr, "");
}

bool same(const Access& a, const Access& now) { return a.thread == now.thread && a.block == now.block; }

// `now` becomes the first of the two; bytes touched at the same clock add up.
void remember(Access (&last)[2], Access now) {
  if (!same(last[0], now) || last[0].atomic != now.atomic)
    last[1] = last[0];
  else if (last[0].clock == now.clock)
    now.bytes |= last[0].bytes;
  last[0] = now;
}

inline void check_word(size_t index, const void* p, Kind kind, const void* pc, const Access& now, const Thread& t) {
  Word& w = words[index];
  Flags& f = flags[index];
  if (now.bytes & ~f.valid) report("out of bounds", p, kind, pc, nullptr, "");
  if (now.bytes & f.pending) report("an asynchronous copy is under way", p, kind, pc, &w.write[0], "issued");
  if (kind != Kind::write && now.bytes & ~f.initialised) report_uninitialised(p, kind, pc);
  for (const Access& a : w.write)
    if (a.bytes & now.bytes && !(a.atomic && now.atomic) && !ordered(a, now.thread, t))
      report("race", p, kind, pc, &a, "unordered with a write");
  if (kind == Kind::read) return remember(w.read, now);
  for (const Access& a : w.read)
    if (a.bytes & now.bytes && !ordered(a, now.thread, t)) report("race", p, kind, pc, &a, "unordered with a read");
  remember(w.write, now);
  f.initialised |= now.bytes;
}

}  // namespace

void reserve() {
  const auto map = [](size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return memory;
  };
  words = static_cast<Word*>(map(kWords * sizeof(Word)));
  flags = static_cast<Flags*>(map(kWords * sizeof(Flags)));
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(&reserve), &info);
  base = static_cast<const char*>(info.dli_fbase);
  dl_iterate_phdr(
      [](dl_phdr_info* object, size_t, void*) {
        if (reinterpret_cast<const char*>(object->dlpi_addr) != base) return 0;
        for (int i = 0; i < object->dlpi_phnum; ++i) {
          const auto& segment = object->dlpi_phdr[i];
          const char* end = base + segment.p_vaddr + segment.p_memsz;
          if (segment.p_type == PT_LOAD && end > base_end) base_end = end;
        }
        return 1;
      },
      nullptr);
}

void allocated(void* p, size_t bytes) {
  std::memset(static_cast<void*>(&words[index_of(p)]), 0, (bytes + 7) / 4 * sizeof(Word));
  for_words(p, bytes, [](size_t i, uint8_t bits) { flags[i].valid |= bits; });
}
void freed(void* p, size_t bytes) {
  for_words(p, bytes, [](size_t i, uint8_t) { flags[i] = {}; });
}
void initialised(void* p, size_t bytes) {
  for_words(p, bytes, [](size_t i, uint8_t bits) { flags[i].initialised |= bits; });
}
void pending(void* p, size_t bytes, bool on) {
  for_words(p, bytes, [on](size_t i, uint8_t bits) {
    flags[i].pending = static_cast<uint8_t>(on ? flags[i].pending | bits : flags[i].pending & ~bits);
  });
}

void access(const void* p, size_t bytes, Kind kind, const void* pc) {
  if (running == nullptr) return;  // launcher code
  if (!in_arena(p)) {
    if (on_stack(*running->fiber, p)) return;
    if (static_cast<const char*>(p) >= base && static_cast<const char*>(p) < base_end) return;  // a constant
    report("not device memory", p, kind, pc, nullptr, "");
  }
  const unsigned me = running_number();
  Access now{block.serial,
             running->clock,
             static_cast<uint32_t>(static_cast<const char*>(pc) - base),
             static_cast<uint16_t>(me),
             0,
             kind == Kind::atomic};
  const size_t first = index_of(p);
  if (bytes == 16) {  // the records of four words are four cache lines: all at once
    for (size_t i = first + 1; i < first + 4; ++i) __builtin_prefetch(&words[i], 1);
  }
  if (bytes % 4 == 0 && reinterpret_cast<uintptr_t>(p) % 4 == 0) {
    now.bytes = 15;
    for (size_t i = first; i < first + bytes / 4; ++i) check_word(i, p, kind, pc, now, *running);
    return;
  }
  for_words(p, bytes, [&](size_t i, uint8_t bits) {
    now.bytes = bits;
    check_word(i, p, kind, pc, now, *running);
  });
}

#endif

}  // namespace shadow
}  // namespace fs::simt

#if defined(FS_SIMT_RACE)
// What the compiler calls at each access of a kernel (-fsanitize=thread), in place of libtsan's.
namespace {

using fs::simt::shadow::Kind;

// An access of a kernel to its own stack, the most frequent one, ends here.
inline bool uninteresting(const void* p) {
  return fs::simt::running == nullptr || fs::simt::on_stack(*fs::simt::running->fiber, p);
}

void anyhow(const void* p, size_t bytes, Kind kind, const void* pc) {
  if (uninteresting(p)) return;
  fs::simt::shadow::access(p, bytes, kind, pc);
  fs::simt::banks::access(p, bytes, pc);
}

void natural(const void* p, size_t bytes, Kind kind, const void* pc) {
  if (uninteresting(p)) return;
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fs::simt::fail("misaligned: " + std::string(kind == Kind::read ? "read" : "write") + " of " +
                   std::to_string(bytes) + " bytes by " + fs::simt::thread_name(fs::simt::running_number()) + " at " +
                   fs::simt::place(pc));
  fs::simt::shadow::access(p, bytes, kind, pc);
  fs::simt::banks::access(p, bytes, pc);
}

}  // namespace

#define FS_TSAN(size)                                                                                           \
  void __tsan_read##size(const void* p) { natural(p, size, Kind::read, __builtin_return_address(0)); }          \
  void __tsan_write##size(void* p) { natural(p, size, Kind::write, __builtin_return_address(0)); }              \
  void __tsan_unaligned_read##size(const void* p) { anyhow(p, size, Kind::read, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##size(void* p) { anyhow(p, size, Kind::write, __builtin_return_address(0)); }     \
  void __tsan_volatile_read##size(const void* p) { natural(p, size, Kind::read, __builtin_return_address(0)); } \
  void __tsan_volatile_write##size(void* p) { natural(p, size, Kind::write, __builtin_return_address(0)); }
extern "C" {
FS_TSAN(1)
FS_TSAN(2)
FS_TSAN(4)
FS_TSAN(8)
FS_TSAN(16)
void __tsan_read_range(const void* p, size_t bytes) { anyhow(p, bytes, Kind::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { anyhow(p, bytes, Kind::write, __builtin_return_address(0)); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
#endif
