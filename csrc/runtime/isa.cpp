#include "isa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fs::isa {
namespace {

struct LevelRow {
  Level level;
  const char* name;
  uint32_t features;
};

constexpr LevelRow kLevels[] = {
    {Level::amx, "amx", kLevelAmx},
    {Level::avx512, "avx512", kLevelAvx512},
    {Level::avxvnni, "avxvnni", kLevelAvxVnni},
    {Level::avx2, "avx2", kLevelAvx2},
    {Level::scalar, "scalar", kLevelScalar},
};

constexpr const LevelRow& row_of(Level level) {
  return kLevels[static_cast<int>(Level::amx) - static_cast<int>(level)];
}
static_assert(row_of(Level::amx).level == Level::amx && row_of(Level::scalar).level == Level::scalar, "best first");

constexpr char kLevelNames[] = "scalar, avx2, avxvnni, avx512, amx";

constexpr int kUnset = -1;
std::atomic<int> forced_level{kUnset};  // set_level()

#if defined(__x86_64__)
// Linux gives a process the 8 KB of tile registers only when it asks; the grant holds for all of its threads.
bool ask_for_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

uint32_t read_cpuid() {
  uint32_t f = 0;
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const bool osxsave = c & bit_OSXSAVE;
  if (!osxsave) return 0;
  unsigned xcr0, xcr0_high;
  asm volatile("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
  const bool os_ymm = (xcr0 & 0x6) == 0x6;    // SSE and AVX state saved by the system
  const bool os_zmm = (xcr0 & 0xe6) == 0xe6;  // and opmask, upper ZMM
  const bool os_tiles = (xcr0 & 0x60000) == 0x60000;
  if (!os_ymm) return 0;
  if (c & bit_FMA) f |= kFma;
  if (c & bit_F16C) f |= kF16c;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  if (b & bit_AVX2) f |= kAvx2;
  if (os_zmm) {
    if (b & bit_AVX512F) f |= kAvx512F;
    if (b & bit_AVX512BW) f |= kAvx512BW;
    if (b & bit_AVX512VL) f |= kAvx512VL;
    if (b & bit_AVX512DQ) f |= kAvx512DQ;
    if (c & bit_AVX512VNNI) f |= kAvx512Vnni;
    if ((c & bit_AVX512VBMI2) && (c & bit_AVX512VBMI)) f |= kAvx512Vbmi2;
    const unsigned amx = (1u << 24) | (1u << 25);  // AMX-TILE, AMX-INT8
    if (os_tiles && (d & amx) == amx && ask_for_tiles()) f |= kAmxInt8;
  }
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4))) f |= kAvxVnni;
#endif
  return f;
}

uint32_t assumed_features() {
  const char* list = std::getenv("FASTSPARSE_ISA_ASSUME");
  uint32_t f = 0;
  if (list == nullptr) return f;
  std::string name;
  for (const char* p = list;; ++p) {
    if (*p != ',' && *p != '\0') {
      name += *p;
      continue;
    }
    if (!name.empty()) f |= row_of(level_from_name(name)).features;
    name.clear();
    if (*p == '\0') return f;
  }
}

std::string available_names() {
  std::string out;
  for (Level level : available_levels()) out += (out.empty() ? "" : ", ") + std::string(level_name(level));
  return out;
}

// `from` says who asked, for the message.
Level reachable_level(const std::string& name, const char* from) {
  Level level;
  try {
    level = level_from_name(name);
  } catch (const std::invalid_argument&) {
    throw std::invalid_argument(std::string(from) + "=" + name + " is not a level; levels: " + kLevelNames);
  }
  for (Level have : available_levels())
    if (have == level) return level;
  throw std::invalid_argument(std::string(from) + "=" + name + " is not on this CPU; available: " + available_names());
}

}  // namespace

const char* level_name(Level level) { return row_of(level).name; }

Level level_from_name(const std::string& name) {
  for (const LevelRow& row : kLevels)
    if (name == row.name) return row.level;
  throw std::invalid_argument("isa: " + name + " is not a level; levels: " + kLevelNames);
}

uint32_t cpu_features() {
  static const uint32_t features = read_cpuid() | assumed_features();
  return features;
}

std::vector<Level> available_levels() {
  std::vector<Level> out;
  for (const LevelRow& row : kLevels)
    if ((cpu_features() & row.features) == row.features) out.push_back(row.level);
  return out;
}

Level current_level() {
  const int forced = forced_level.load(std::memory_order_relaxed);
  if (forced != kUnset) return static_cast<Level>(forced);
  // The environment is read once; a bad value throws at every call, since a throwing initialiser runs again.
  static const Level from_environment = [] {
    const char* name = std::getenv("FASTSPARSE_ISA");
    return name == nullptr || *name == '\0' ? available_levels().front() : reachable_level(name, "FASTSPARSE_ISA");
  }();
  return from_environment;
}

std::string level_reason() {
  if (forced_level.load(std::memory_order_relaxed) != kUnset) return "forced by set_isa()";
  const char* name = std::getenv("FASTSPARSE_ISA");
  if (name != nullptr && *name != '\0') return "capped by FASTSPARSE_ISA=" + std::string(name);
  return "the best level that this CPU has";
}

void set_level(const std::string& name) {
  forced_level.store(name.empty() ? kUnset : static_cast<int>(reachable_level(name, "isa")));
}

bool usable(Level level, uint32_t features) {
  return level <= current_level() && (cpu_features() & features) == features;
}

bool amd() {
#if defined(__x86_64__)
  static const bool is = [] {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(0, &eax, &ebx, &ecx, &edx) != 0 && ecx == 0x444d4163;  // the end of "AuthenticAMD"
  }();
  return is;
#else
  return false;
#endif
}

namespace {

unsigned amd_family() {  // 0: not by AMD
#if defined(__x86_64__)
  unsigned eax, ebx, ecx, edx;
  if (!amd() || __get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return 0;
  return (eax >> 8 & 15) + (eax >> 20 & 255);
#else
  return 0;
#endif
}

}  // namespace

bool zen4() {
  static const bool is = amd_family() == 25;
  return is;
}

bool zen5() {
  static const bool is = amd_family() == 26;
  return is;
}

int64_t l2_bytes() {
  static const int64_t bytes = [] {
    const long got = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return got > 0 ? static_cast<int64_t>(got) : int64_t{1} << 20;
  }();
  return bytes;
}

}  // namespace fs::isa
