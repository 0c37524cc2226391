// CPU features, the named levels that cap them, and the choice of a kernel row.
//
// A kernel names the features it needs; a table lists rows best first; the first row that fits wins.
// A level is only a name for a cap: FASTSPARSE_ISA=avx2 passes over every row whose level lies above avx2.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "export.h"
#include "features.h"

namespace fs::isa {

// Name <-> level; level_from_name throws std::invalid_argument that lists the names.
FASTSPARSE_API const char* level_name(Level level);
FASTSPARSE_API Level level_from_name(const std::string& name);

// What this CPU and its operating system execute (CPUID and XGETBV), plus FASTSPARSE_ISA_ASSUME, a test-only
// comma-separated list of level names whose features are taken for granted.
FASTSPARSE_API uint32_t cpu_features();

// The levels that cpu_features() reaches, best first; scalar is always the last.
FASTSPARSE_API std::vector<Level> available_levels();

// The cap in force: set_level(), else FASTSPARSE_ISA, else the best level. Throws std::invalid_argument for a name
// that does not exist or that this CPU does not reach. Resolved before work is split over threads.
FASTSPARSE_API Level current_level();

// Why current_level() is what it is, for people.
FASTSPARSE_API std::string level_reason();

// Forces a cap for the whole process; an empty name returns to FASTSPARSE_ISA. Same errors as current_level().
FASTSPARSE_API void set_level(const std::string& name);

// True if a row of this level and these features may run now.
FASTSPARSE_API bool usable(Level level, uint32_t features);

// A CPU by AMD: for thresholds that go with a core's prefetchers, never for what is correct.
bool amd();
bool zen4();  // and Zen 3, which has the same family number
bool zen5();

// Bytes of one core's L2; 1 MB where the system does not say.
int64_t l2_bytes();

}  // namespace fs::isa
