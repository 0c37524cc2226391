// CPU features and the named levels that cap them. No STL: ISA files include this.
#pragma once
#include <stdint.h>

namespace fs::isa {

enum Feature : uint32_t {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kF16c = 1u << 2,
  kAvxVnni = 1u << 3,
  kAvx512F = 1u << 4,
  kAvx512BW = 1u << 5,
  kAvx512VL = 1u << 6,
  kAvx512DQ = 1u << 7,
  kAvx512Vnni = 1u << 8,
  kAvx512Vbmi2 = 1u << 9,  // and VBMI: no CPU has the one without the other
  kAmxInt8 = 1u << 10,     // AMX-TILE and AMX-INT8, and the system lets this process use them
};

// What the levels promise; every x86-64-v3 CPU has F16C beside AVX2 and FMA.
constexpr uint32_t kLevelScalar = 0;
constexpr uint32_t kLevelAvx2 = kAvx2 | kFma | kF16c;
constexpr uint32_t kLevelAvxVnni = kLevelAvx2 | kAvxVnni;
constexpr uint32_t kLevelAvx512 = kLevelAvx2 | kAvx512F | kAvx512BW | kAvx512VL | kAvx512DQ | kAvx512Vnni;

constexpr uint32_t kLevelAmx = kLevelAvx512 | kAmxInt8;

enum class Level : int { scalar, avx2, avxvnni, avx512, amx };

}  // namespace fs::isa
