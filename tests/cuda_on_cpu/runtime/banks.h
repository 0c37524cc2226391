// Bank conflicts of ordinary accesses of shared memory, in the race build, which sees every access (cp.async's and
// ldmatrix's too). In the other builds empty.
//
// Lanes do not run in lockstep here, so which accesses of a warp are one instruction must be told afterwards: those of
// the same place in the code, the n-th of each lane since the warp last met (at a barrier or at an operation of all its
// lanes). Where lanes make different numbers of turns in between, that is a guess.
// The banks: 32 of four bytes. A warp's accesses of 8 bytes pass by halves, of 16 by quarters; the same word costs
// once.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace fs::simt::banks {

void begin_block();
void access(const void* p, size_t bytes, const void* pc);  // by the running thread
void met(unsigned warp);                                   // all lanes of the warp that are alive
void end_block();

int64_t take_extra_passes();  // since the last call
std::string places();         // of what the last call of that returned: "file:line: 12 extra passes", the worst first

}  // namespace fs::simt::banks
