// The packs of a sparse int8 weight s8[N,K]: one face for their layouts (formats/{bitmap,windows,blocks}_s8.h).
#pragma once
#include <string>

#include "../int8.h"

namespace fs::sparse_matmul::int8 {

// A pack of any of the formats.
struct Weight {
  int64_t n, k;
  Layout layout;
  Bitmap bitmap;  // that of these which layout names
  Windows windows;
  Blocks blocks;
};

// Takes a pack apart. Empty if its header and size are right, or with `validated` every byte; else what is wrong, for
// "... must be a pack: ".
std::string view(const uint8_t* bytes, int64_t size, bool validated, Weight* out);

// The inverse of packing, into a contiguous s8[n, k]; the pack has been validated.
void unpack(const Weight& w, int8_t* weight);

}  // namespace fs::sparse_matmul::int8
