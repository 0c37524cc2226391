// Rows, patterns of parameters and threads of qdq; knows no ISA.
#include <algorithm>

#include "../../runtime/parallel.h"
#include "../../runtime/workspace.h"
#include "../qdq.h"
#include "../select.h"

namespace fs::qdq {
namespace {

constexpr int64_t kPart = 64;       // columns are shared out in multiples of it: whole lines of codes, whole mask bytes
constexpr int64_t kPattern = 1024;  // elements of a pattern at a time: three arrays of 4 KB stay in L1

int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Calls body(row_begin, row_end, begin, end) for parts of [0, rows) x [0, length), one a thread.
template <class Body>
void split(int64_t rows, int64_t length, const Body& body) {
  const int64_t threads = threads_for(rows * length);
  if (threads <= 1) return body(0, rows, 0, length);
  if (rows >= 8 * threads) return parallel_for(rows, [&](int64_t begin, int64_t end) { body(begin, end, 0, length); });
  const int64_t part = ((length + threads - 1) / threads + kPart - 1) / kPart * kPart;
  parallel_for((length + part - 1) / part,
               [&](int64_t begin, int64_t end) { body(0, rows, begin * part, std::min(end * part, length)); });
}

// The parameters of elements [begin, end) of a varying row, one entry an element, in this thread's scratch.
struct Pattern {
  float *scale, *inverse;
  int32_t* zero_point;

  Pattern() {
    constexpr int64_t size = kPattern + kPatternPad;
    scale = reinterpret_cast<float*>(scratch(3 * size * sizeof(float)));
    inverse = scale + size;
    zero_point = reinterpret_cast<int32_t*>(inverse + size);
    std::fill(scale, scale + 2 * size, 1.0f);
    std::fill(zero_point, zero_point + size, 0);
  }
  void fill(const Parameters& p, int64_t begin, int64_t end) {
    const int64_t inner = p.shape.inner;
    for (int64_t i = begin; i < end;) {
      const int64_t c = i / inner, stop = std::min(end, (c + 1) * inner);
      const float s = p.scale[c], inv = 1.0f / s;
      const int32_t zero = p.zero_point ? p.zero_point[c] : 0;
      for (; i < stop; ++i) {
        scale[i - begin] = s;
        inverse[i - begin] = inv;
        zero_point[i - begin] = zero;
      }
    }
  }
};

// A step over all rows. `args` has what all parts share; in, out and mask point to the first element.
void map(void (*step)(const MapArgs&), MapArgs args, const Parameters& p, int64_t in_bytes, int64_t out_bytes) {
  const Rows rows = rows_of(p.shape);
  if (rows.rows == 0 || rows.length == 0) return;
  args.stride = rows.length;
  args.mask_stride = mask_bytes(rows.length);
  args.varying = rows.varying;
  args.channels = p.shape.channels;
  args.stream = stream(rows.rows * rows.length * out_bytes);
  split(rows.rows, rows.length, [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
    const auto part = [&](int64_t from, int64_t to) {
      MapArgs a = args;
      a.in = static_cast<const char*>(args.in) + (row_begin * rows.length + from) * in_bytes;
      a.out = static_cast<char*>(args.out) + (row_begin * rows.length + from) * out_bytes;
      if (args.mask) a.mask = args.mask + row_begin * args.mask_stride + from / 8;
      a.rows = row_end - row_begin;
      a.length = to - from;
      return a;
    };
    if (!rows.varying) {
      MapArgs a = part(begin, end);
      a.scale = p.scale;
      a.zero_point = p.zero_point;
      a.channel = row_begin % p.shape.channels;
      return step(a);
    }
    Pattern pattern;
    for (int64_t from = begin; from < end; from += kPattern) {
      const int64_t to = std::min(end, from + kPattern);
      pattern.fill(p, from, to);
      MapArgs a = part(from, to);
      a.scale = pattern.scale;
      a.inverse = pattern.inverse;
      a.zero_point = pattern.zero_point;
      step(a);
    }
  });
}

}  // namespace

void quantize_per_token(const Kernels& kernels, const TokenArgs& args) {
  if (args.rows == 0) return;
  const bool streamed = stream(args.rows * args.k);
  const auto rows = [&](int64_t begin, int64_t end) {
    TokenArgs a = args;
    a.x = static_cast<const char*>(args.x) + begin * args.x_stride * element_bytes(args.dtype);
    a.codes = args.codes + begin * args.k;
    a.scale = args.scale + begin;
    a.rows = end - begin;
    a.stream = streamed;
    kernels.quantize_per_token(a);
  };
  if (threads_for(args.rows * args.k) <= 1) return rows(0, args.rows);
  parallel_for(args.rows, rows);
}

void quantize(const Kernels& kernels, const void* x, DType dtype, const Parameters& p, int8_t* codes) {
  MapArgs a{};
  a.in = x;
  a.out = codes;
  a.dtype = dtype;
  map(kernels.quantize, a, p, element_bytes(dtype), 1);
}

void dequantize(const Kernels& kernels, const int8_t* codes, const Parameters& p, void* y, DType dtype) {
  MapArgs a{};
  a.in = codes;
  a.out = y;
  a.dtype = dtype;
  map(kernels.dequantize, a, p, 1, element_bytes(dtype));
}

void fake_quantize(const Kernels& kernels, const void* x, DType dtype, const Parameters& p, int32_t lowest,
                   int32_t highest, void* y, uint8_t* mask) {
  MapArgs a{};
  a.in = x;
  a.out = y;
  a.dtype = dtype;
  a.mask = mask;
  a.lowest = lowest;
  a.highest = highest;
  map(kernels.fake_quantize, a, p, element_bytes(dtype), element_bytes(dtype));
}

void fake_quantize_grad(const Kernels& kernels, const void* grad, DType dtype, int64_t rows, int64_t length,
                        const uint8_t* mask, void* grad_x) {
  if (rows == 0 || length == 0) return;
  const int64_t bytes = element_bytes(dtype);
  MapArgs all{};
  all.dtype = dtype;
  all.stride = length;
  all.mask_stride = mask_bytes(length);
  all.stream = stream(rows * length * bytes);
  split(rows, length, [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
    MapArgs a = all;
    a.in = static_cast<const char*>(grad) + (row_begin * length + begin) * bytes;
    a.out = static_cast<char*>(grad_x) + (row_begin * length + begin) * bytes;
    a.mask = const_cast<uint8_t*>(mask) + row_begin * all.mask_stride + begin / 8;  // only read
    a.rows = row_end - row_begin;
    a.length = end - begin;
    kernels.fake_quantize_grad(a);
  });
}

}  // namespace fs::qdq
