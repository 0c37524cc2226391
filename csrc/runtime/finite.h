// Whether all floats of an argument are finite: asked in each call, so it must cost nothing beside the kernel.
#pragma once
#include <cstdint>
#include <cstring>

namespace fs {

inline bool all_finite(const float* p, int64_t n) {
  // Only where all bits of the exponent are set does the sum reach the sign's bit. Vectors by name: gcc at -O2 makes
  // none of a loop whose count it does not know.
  typedef uint32_t Bits __attribute__((vector_size(16)));
  const auto reach = [](const float* at) __attribute__((always_inline)) {
    Bits bits;
    std::memcpy(&bits, at, sizeof bits);
    return (bits & 0x7fffffffu) + 0x00800000u;
  };
  Bits a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    a |= reach(p + i);
    b |= reach(p + i + 4);
    c |= reach(p + i + 8);
    d |= reach(p + i + 12);
  }
  a |= b | c | d;
  uint32_t any = a[0] | a[1] | a[2] | a[3];
  for (; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, p + i, sizeof bits);
    any |= (bits & 0x7fffffffu) + 0x00800000u;
  }
  return any < 0x80000000u;
}

}  // namespace fs
