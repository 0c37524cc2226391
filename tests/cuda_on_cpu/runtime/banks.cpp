#include "banks.h"

#include <algorithm>
#include <map>
#include <vector>

#include "memory.h"
#include "runtime.h"
#include "shadow.h"

namespace fs::simt::banks {

#if !defined(FS_SIMT_RACE)

void begin_block() {}
void access(const void*, size_t, const void*) {}
void met(unsigned) {}
void end_block() {}
int64_t take_extra_passes() { return 0; }
std::string places() { return ""; }

#else

namespace {

struct Instruction {  // the n-th of a site: where each lane went
  uint32_t lanes;
  uint32_t address[32];
};

struct Site {
  const void* pc;
  unsigned bytes;
  uint16_t done[32];  // how often each lane was here
  size_t used;        // of `instructions`, which stay allocated
  std::vector<Instruction> instructions;
};

struct Warp {
  std::vector<Site> sites;
  size_t used = 0;
  size_t next[32] = {};  // where each lane's next access is likely to be
};

std::vector<Warp> warps;
std::map<const void*, int64_t> extra, taken;  // by place in the code

// Extra passes of the lanes [begin, end).
int extra_passes(const Instruction& i, int begin, int end, unsigned bytes) {
  uint32_t word[32][32];  // by bank, different ones
  uint8_t count[32] = {};
  int most = 1;
  for (int lane = begin; lane < end; ++lane) {
    if (!(i.lanes >> lane & 1)) continue;
    for (uint32_t w = i.address[lane] / 4; w < (i.address[lane] + bytes + 3) / 4; ++w) {
      uint32_t* known = word[w % 32];
      uint8_t& n = count[w % 32];
      if (std::find(known, known + n, w) != known + n) continue;
      known[n++] = w;
      most = std::max<int>(most, n);
    }
  }
  return most - 1;
}

Site& site_of(Warp& warp, unsigned lane, const void* pc, unsigned bytes) {
  size_t& guess = warp.next[lane];
  for (size_t tried = 0; tried < warp.used; ++tried) {
    if (guess >= warp.used) guess = 0;
    Site& site = warp.sites[guess++];
    if (site.pc == pc && site.bytes == bytes) return site;
  }
  if (warp.used == warp.sites.size()) warp.sites.emplace_back();
  Site& site = warp.sites[warp.used++];
  guess = warp.used;
  site.pc = pc;
  site.bytes = bytes;
  std::fill(site.done, site.done + 32, uint16_t{0});
  site.used = 0;
  return site;
}

}  // namespace

void begin_block() { warps.resize((block.count + 31) / 32); }

void access(const void* p, size_t bytes, const void* pc) {
  if (bytes > 16 || !in_shared(p)) return;
  const unsigned number = running_number(), lane = number % 32;
  Site& site = site_of(warps[number / 32], lane, pc, static_cast<unsigned>(bytes));
  const size_t n = site.done[lane]++;
  if (n == site.used) {
    if (site.used == site.instructions.size()) site.instructions.emplace_back();
    site.instructions[site.used++].lanes = 0;
  }
  Instruction& i = site.instructions[n];
  i.lanes |= 1u << lane;
  i.address[lane] = static_cast<uint32_t>(static_cast<const char*>(p) - arena);
}

void met(unsigned number) {
  Warp& warp = warps[number];
  for (size_t s = 0; s < warp.used; ++s) {
    const Site& site = warp.sites[s];
    const int at_once = site.bytes <= 4 ? 32 : site.bytes <= 8 ? 16 : 8;
    int64_t passes = 0;
    for (size_t i = 0; i < site.used; ++i)
      for (int lane = 0; lane < 32; lane += at_once)
        passes += extra_passes(site.instructions[i], lane, lane + at_once, site.bytes);
    if (passes > 0) extra[site.pc] += passes;
  }
  warp.used = 0;
}

void end_block() {
  for (unsigned w = 0; w < warps.size(); ++w) met(w);
}

int64_t take_extra_passes() {
  taken = std::move(extra);
  extra.clear();
  int64_t sum = 0;
  for (const auto& [pc, passes] : taken) sum += passes;
  return sum;
}

std::string places() {
  std::vector<std::pair<int64_t, const void*> > worst;
  for (const auto& [pc, passes] : taken) worst.emplace_back(passes, pc);
  std::sort(worst.rbegin(), worst.rend());
  if (worst.size() > 8) worst.resize(8);
  std::string text;
  for (const auto& [passes, pc] : worst) text += place(pc) + ": " + std::to_string(passes) + " extra passes\n";
  return text;
}

#endif

}  // namespace fs::simt::banks
