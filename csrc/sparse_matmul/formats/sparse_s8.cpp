#include "sparse_s8.h"

#include <cstring>

#include "bitmap_s8.h"
#include "blocks_s8.h"
#include "windows_s8.h"

namespace fs::sparse_matmul::int8 {

std::string view(const uint8_t* bytes, int64_t size, bool validated, Weight* out) {
  if (size < kPackHeaderBytes) return "got " + std::to_string(size) + " bytes, a header alone has 64";
  PackHeader h;
  std::memcpy(&h, bytes, sizeof h);
  if (std::memcmp(h.magic, "fspk", 4) != 0)
    return "got bytes that do not begin with \"fspk\"; make one with ops.pack()";
  out->n = h.n;
  out->k = h.k;
  switch (h.format) {
    case bitmap_s8::kFormat:
      out->layout = Layout::bitmap;
      return (validated ? bitmap_s8::validate : bitmap_s8::view)(h, bytes, size, &out->bitmap);
    case windows_s8::kFormat:
      out->layout = Layout::windows;
      return (validated ? windows_s8::validate : windows_s8::view)(h, bytes, size, &out->windows);
    case blocks_s8::kFormat:
      out->layout = Layout::blocks;
      return (validated ? blocks_s8::validate : blocks_s8::view)(h, bytes, size, &out->blocks);
  }
  return "got format " + std::to_string(h.format) + ", expected 11 (bitmap_s8), 12 (blocks_s8) or 16 (windows_s8)";
}

void unpack(const Weight& w, int8_t* weight) {
  switch (w.layout) {
    case Layout::bitmap: return bitmap_s8::unpack(w.bitmap, weight);
    case Layout::windows: return windows_s8::unpack(w.windows, weight);
    case Layout::blocks: return blocks_s8::unpack(w.blocks, weight);
  }
}

}  // namespace fs::sparse_matmul::int8
