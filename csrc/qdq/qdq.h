// qdq, quantize and dequantize: the contract of every kernel of the family. Read this first. Torch-free.
//
//   quantize            code = clamp(round_half_even(x * (1 / scale)) + zero_point, -128, 127), NaN -> zero_point,
//                       infinities saturate
//   quantize_per_token  per row: scale = max(absmax / 127, FLT_MIN), 1 for a row of zeros, NaN (and codes 0) for a row
//                       with a NaN or an infinity; code = round_half_even(x * (1 / scale)), in [-127, 127].
//                       The codes and scales that int8_linear makes of its x: both run cpu/rows.inl.
//   dequantize          y = float(code - zero_point) * scale, one rounding in float32 and one to y's type
//   fake_quantize       y = float(q - zero_point) * scale, q = clamp(round_half_even(x * (1 / scale)) + zero_point,
//                       lowest, highest); gradient: that of y where q needed no clamping and x is no NaN, else 0
//
// All arithmetic is elementwise float32: bit-equal on every level, and independent of threads and of neighbours.
//
// Memory: x, codes and y are contiguous (only quantize_per_token reads rows that lie apart). With parameters per
// channel they are [outer, channels, inner]; a launcher sees that as rows in one of two ways (rows_of()):
//   uniform   inner is long: a row is `inner` elements that share a scale
//   varying   inner is short (1 where the axis is the last): a row is channels * inner elements, each with its own
//             parameters, which are the same for every row
// The mask of fake_quantize has one bit an element, 1 where the gradient passes: u8 [rows, ceil(length / 8)], element i
// of a row at bit i % 8 of byte i / 8; the bits beyond a row's end are 0.
//
// Nothing is read or written outside the stated ranges.
#pragma once
#include <stdint.h>

#include "../runtime/dtype.h"
#include "../runtime/features.h"

namespace fs::qdq {

using fs::DType;

// Rows of x to rows of codes, each with its scale.
struct TokenArgs {
  const void* x;  // [rows, k] of dtype, rows x_stride elements apart
  DType dtype;
  int64_t x_stride;
  int64_t rows, k;
  int8_t* codes;  // [rows, k], contiguous
  float* scale;   // [rows]
  bool stream;    // store past the caches
};

// An elementwise step over `rows` rows of `length` elements, `stride` elements apart in input and output.
struct MapArgs {
  const void* in;
  void* out;
  DType dtype;    // of the floats
  uint8_t* mask;  // fake_quantize: written if not null; fake_quantize_grad: read. A row's begins at a whole byte.
  int64_t rows, length, stride, mask_stride;
  // Uniform: row r takes entry (channel + r) % channels of scale and zero_point (null: all zero); inverse is not read.
  // Varying: element i of every row takes entry i; entries up to kPatternPad beyond the row's end may be read.
  bool varying;
  const float* scale;
  const float* inverse;  // 1 / scale
  const int32_t* zero_point;
  int64_t channel, channels;
  int32_t lowest, highest;  // fake_quantize
  bool stream;
};

inline constexpr int64_t kPatternPad = 64;

struct Kernels {
  const char* name;
  isa::Level level;
  uint32_t features;
  int group;  // elements that a step handles at once
  void (*quantize_per_token)(const TokenArgs&);
  void (*quantize)(const MapArgs&);            // float -> s8
  void (*dequantize)(const MapArgs&);          // s8 -> float
  void (*fake_quantize)(const MapArgs&);       // float -> float
  void (*fake_quantize_grad)(const MapArgs&);  // gradient of y -> gradient of x; needs only the mask
};

// One per ISA file (cpu/<level>.cpp).
extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// What the parameters of a tensor [outer, channels, inner] mean for its rows.
struct Channels {
  int64_t outer, channels, inner;
};
struct Rows {
  int64_t rows, length;
  bool varying;
};

// Shorter rows than this cost more in being begun than in being done. ops/qdq.py states the same for the mask's shape.
inline constexpr int64_t kShortRow = 64;

inline Rows rows_of(const Channels& c) {
  if (c.channels == 1) return {1, c.outer * c.inner, false};
  if (c.inner >= kShortRow) return {c.outer * c.channels, c.inner, false};
  return {c.outer, c.channels * c.inner, true};
}

inline int64_t mask_bytes(int64_t length) { return (length + 7) / 8; }

// cpu/launch.cpp: rows, patterns, threads. `kernels` is what select() chose before work is split.
struct Parameters {
  Channels shape;
  const float* scale;         // [channels]; finite and at least FLT_MIN but for dequantize
  const int32_t* zero_point;  // [channels], each a code, or null
};

void quantize_per_token(const Kernels& kernels, const TokenArgs& args);  // decides `stream` itself
void quantize(const Kernels& kernels, const void* x, DType dtype, const Parameters& p, int8_t* codes);
void dequantize(const Kernels& kernels, const int8_t* codes, const Parameters& p, void* y, DType dtype);
// mask: null, or [rows, mask_bytes(length)] of rows_of(p.shape).
void fake_quantize(const Kernels& kernels, const void* x, DType dtype, const Parameters& p, int32_t lowest,
                   int32_t highest, void* y, uint8_t* mask);
void fake_quantize_grad(const Kernels& kernels, const void* grad, DType dtype, int64_t rows, int64_t length,
                        const uint8_t* mask, void* grad_x);

}  // namespace fs::qdq
