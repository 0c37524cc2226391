// The two 16-bit float types at the boundary of a kernel, as raw bits. No STL: ISA files include this.
#pragma once
#include <stdint.h>

namespace fs {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace fs
