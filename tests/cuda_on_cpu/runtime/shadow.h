// The race build's memory of who touched what: one record for every four bytes of device memory. In the other builds
// all of this is empty.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fs::simt::shadow {

#if defined(FS_SIMT_RACE)
constexpr bool kOn = true;
#else
constexpr bool kOn = false;
#endif

enum class Kind : uint8_t { read, write, atomic };

void reserve();                                // once, for the whole arena
void allocated(void* p, size_t bytes);         // valid from now on, uninitialised, untouched
void freed(void* p, size_t bytes);             // invalid
void initialised(void* p, size_t bytes);       // by the host
void pending(void* p, size_t bytes, bool on);  // an asynchronous copy is on its way there

// An access by the running thread, from the instruction at `pc`.
void access(const void* p, size_t bytes, Kind kind, const void* pc);

}  // namespace fs::simt::shadow
