// Holds every row of the int8_gemm table that this CPU runs against the scalar row, bit for bit, and the scalar row
// against plain loops; without torch, so that it is a small static program which an instruction emulator can run too
// (that is how the AVX-512 row is checked where no CPU at hand has it: docs/kernels/int8_gemm.md).
// Inputs lie between poisoned margins and outputs between canaries: a read outside changes a result, a write shows.
//
// Usage: int8_gemm [cases] [seed]. Exit status 0: all equal.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/int8_gemm/formats/bitmap_u4.h"
#include "../../csrc/int8_gemm/formats/u4.h"
#include "../../csrc/int8_gemm/formats/vnni16.h"
#include "../../csrc/int8_gemm/int8_gemm.h"
#include "../../csrc/int8_gemm/select.h"
#include "support.h"

namespace {

using namespace fs::int8_gemm;

float random_x(int kind) {
  const float normal = std::normal_distribution<float>()(generator);
  switch (kind) {
    case 0: return normal;
    case 1: return normal * 1e-39f;
    case 2: return normal * 1e37f;
    default: return uniform(0, 40) == 0 ? std::nanf("") : uniform(0, 40) == 0 ? INFINITY : normal;
  }
}

// A random 16-bit pattern of that type near the float would need a rounding; the bits themselves do as well.
void fill_x(uint8_t* x, DType dtype, int64_t count, int kind) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = random_x(kind);
    if (dtype == DType::f32) {
      std::memcpy(x + 4 * i, &value, 4);
      continue;
    }
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t half =
        dtype == DType::bf16
            ? static_cast<uint16_t>(bits >> 16)
            : static_cast<uint16_t>(kind == 3 ? uniform(0, 65535) : uniform(0, 1) * 0x8000 + uniform(0, 0x43ff));
    std::memcpy(x + 2 * i, &half, 2);
  }
}

std::string shape(int64_t m, int64_t n, int64_t k) {
  return "M=" + std::to_string(m) + " N=" + std::to_string(n) + " K=" + std::to_string(k);
}

// The bits of a NaN are no result: all NaNs are made one before the comparison.
std::vector<uint8_t> comparable(Guarded& y, DType dtype, bool codes = false) {
  const size_t size = dtype == DType::f32 ? 4 : 2;
  std::vector<uint8_t> got(y.data(), y.data() + y.bytes);
  if (codes) return got;
  for (size_t i = 0; i < got.size(); i += size) {
    if (size == 4) {
      float f;
      std::memcpy(&f, &got[i], 4);
      if (f != f) std::memset(&got[i], 0xff, 4);
    } else {
      uint16_t h;
      std::memcpy(&h, &got[i], 2);
      if ((h & 0x7fff) > (dtype == DType::bf16 ? 0x7f80 : 0x7c00)) std::memset(&got[i], 0xff, 2);
    }
  }
  return got;
}

void check_linear(const std::vector<const Kernels*>& rows) {
  const int64_t m = pick({1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 14, 15, 27, 29, 61, 130}),
                n = pick({1, 15, 16, 17, 31, 33, 64, 65, 100, 129});
  const int64_t k = pick({0, 1, 3, 4, 5, 63, 64, 65, 127, 260, 511, 513, 1023, 1024, 1029, 2051});
  const int64_t stride = k + pick({0, 0, 3});
  LinearArgs a{};
  a.x_codes = uniform(0, 3) == 0;
  a.dtype = static_cast<DType>(uniform(0, 2));
  a.y_dtype = static_cast<DType>(uniform(0, 2));
  a.requantize = uniform(0, 2) == 0;
  const auto bytes_of = [](DType type) { return static_cast<size_t>(type == DType::f32 ? 4 : 2); };
  const size_t x_size = a.x_codes ? 1 : bytes_of(a.dtype), y_float_size = bytes_of(a.y_dtype);
  const size_t y_size = a.requantize ? 1 : y_float_size;
  Guarded x(static_cast<size_t>(m * stride) * x_size, 0xff);  // 0xffff.. is a NaN in each of the three types
  const int kind = static_cast<int>(uniform(0, 3));
  for (int64_t r = 0; r < m; ++r) {
    uint8_t* row = x.data() + static_cast<size_t>(r * stride) * x_size;
    if (!a.x_codes) fill_x(row, a.dtype, k, kind);
    for (int64_t i = 0; a.x_codes && i < k; ++i) row[i] = static_cast<uint8_t>(uniform(0, 255));
  }
  const int64_t residual_stride = n + pick({0, 0, 5});
  Guarded residual(static_cast<size_t>(m * residual_stride) * y_float_size, 0xff);
  for (int64_t r = 0; r < m; ++r)
    fill_x(residual.data() + static_cast<size_t>(r * residual_stride) * y_float_size, a.y_dtype, n, kind);
  Guarded row_scales(static_cast<size_t>(m) * 4, 0xff);
  fill_x(row_scales.data(), DType::f32, m, kind);
  std::vector<int8_t> weight(static_cast<size_t>(n * k));
  const bool extreme = uniform(0, 3) == 0;
  for (int8_t& w : weight) w = static_cast<int8_t>(extreme ? -128 : uniform(-128, 127));
  Guarded pack(static_cast<size_t>(fs::vnni16::pack_bytes(n, k)), 0xee);
  fs::vnni16::pack(weight.data(), k, 1, n, k, pack.data());
  Guarded scale(static_cast<size_t>(n) * 4, 0xff), bias(static_cast<size_t>(n) * 4, 0xff);
  for (int64_t j = 0; j < n; ++j) {
    const float s = std::abs(random_x(0)) * 0.01f, b = random_x(0);
    std::memcpy(scale.data() + 4 * j, &s, 4);
    std::memcpy(bias.data() + 4 * j, &b, 4);
  }
  a.x = x.data();
  a.x_stride = stride;
  a.m = m;
  a.n = n;
  a.k = k;
  a.weight = pack.data();
  a.weight_scale = reinterpret_cast<float*>(scale.data());
  a.bias = uniform(0, 1) ? reinterpret_cast<float*>(bias.data()) : nullptr;
  a.activation = static_cast<Activation>(uniform(0, 3));
  a.dynamic = uniform(0, 2) != 0;
  a.x_scale = 0.037f;
  a.x_zero_point = static_cast<int32_t>(uniform(-128, 127));
  if (a.x_codes) a.dynamic = false;
  if (a.x_codes && uniform(0, 1)) a.x_scales = reinterpret_cast<float*>(row_scales.data());
  if (uniform(0, 1)) a.residual = residual.data();
  a.residual_stride = residual_stride;
  a.y_scale = 0.7f;
  a.y_zero_point = static_cast<int32_t>(uniform(-128, 127));
  std::vector<uint8_t> expected;
  for (const Kernels* row : rows) {  // scalar first
    Guarded y(static_cast<size_t>(m * n) * y_size, 0x5a);
    a.y = y.data();
    linear(*row, a);
    const std::string what = "int8_linear " + shape(m, n, k) + " dtype " + std::to_string(static_cast<int>(a.dtype)) +
                             (a.x_codes ? " codes" : "") + " y " + std::to_string(static_cast<int>(a.y_dtype)) +
                             (a.requantize ? " requantized" : "") + (a.residual ? " residual" : "") + " activation " +
                             std::to_string(static_cast<int>(a.activation)) + (a.dynamic ? " dynamic" : " static") +
                             " x kind " + std::to_string(kind);
    if (!y.margins_intact()) fail(*row, what + ": wrote outside y");
    const std::vector<uint8_t> got = comparable(y, a.y_dtype, a.requantize);
    if (row == rows.front())
      expected = got;
    else if (got != expected)
      fail(*row, what + ": differs from scalar");
  }
}

void check_matmul(const std::vector<const Kernels*>& rows) {
  const int64_t m = pick({1, 2, 5, 7, 14, 15, 29}), n = pick({1, 16, 17, 33, 64, 70}),
                k = pick({0, 1, 3, 4, 64, 66, 300, 1024, 1025});
  const int fill = static_cast<int>(uniform(0, 3));  // random, min x min, min x max, max x max
  Guarded a(static_cast<size_t>(m * k), 0x7f), b(static_cast<size_t>(k * n), 0x7f);
  auto* pa = reinterpret_cast<int8_t*>(a.data());
  auto* pb = reinterpret_cast<int8_t*>(b.data());
  for (int64_t i = 0; i < m * k; ++i)
    pa[i] = static_cast<int8_t>(fill == 0 ? uniform(-128, 127) : fill == 3 ? 127 : -128);
  for (int64_t i = 0; i < k * n; ++i)
    pb[i] = static_cast<int8_t>(fill == 0 ? uniform(-128, 127) : fill == 1 ? -128 : 127);
  std::vector<int32_t> expected(static_cast<size_t>(m * n));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < k; ++p)
      for (int64_t j = 0; j < n; ++j) expected[static_cast<size_t>(i * n + j)] += pa[i * k + p] * pb[p * n + j];
  for (const Kernels* row : rows) {
    Guarded c(static_cast<size_t>(m * n) * 4, 0x5a);
    matmul(*row, {pa, k, pb, n, 1, m, n, k, reinterpret_cast<int32_t*>(c.data())});
    if (!c.margins_intact()) fail(*row, "int8_mm " + shape(m, n, k) + ": wrote outside c");
    if (std::memcmp(c.data(), expected.data(), c.bytes) != 0)
      fail(*row, "int8_mm " + shape(m, n, k) + " fill " + std::to_string(fill) + ": wrong");
  }
}

void check_weight_only(const std::vector<const Kernels*>& rows) {
  const int64_t m = pick({1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 29, 61}),
                n = pick({1, 15, 16, 17, 33, 48, 64, 65, 100, 129});
  const int64_t k = pick({0, 1, 4, 5, 31, 32, 33, 64, 127, 128, 129, 132, 260, 513, 1029});
  const bool u4 = uniform(0, 3) != 0, affine = uniform(0, 1) != 0;
  const fs::u4::Layout layout{n, k, pick({32, 64, 128}), affine};
  const int64_t stride = k + pick({0, 0, 3});
  WeightOnlyArgs a{};
  a.dtype = static_cast<DType>(uniform(0, 2));
  const size_t size = a.dtype == DType::f32 ? 4 : 2;
  Guarded x(static_cast<size_t>(m * stride) * size, 0xff);
  const int kind = static_cast<int>(uniform(0, 3));
  for (int64_t r = 0; r < m; ++r) fill_x(x.data() + static_cast<size_t>(r * stride) * size, a.dtype, k, kind);
  const int64_t bytes = u4 ? layout.bytes() : fs::vnni16::pack_bytes(n, k);
  Guarded pack(static_cast<size_t>(bytes), 0xee, pick({0, 8}));  // a mapped file promises no more than 8
  std::vector<uint8_t> codes(static_cast<size_t>(n * k));
  const bool extreme = uniform(0, 3) == 0;
  const int zeros = static_cast<int>(pick({0, 50, 90, 100}));
  Guarded sparse(0, 0);
  BitmapU4 bitmap{};
  if (u4) {
    for (uint8_t& c : codes) c = static_cast<uint8_t>(extreme ? (affine ? 15 : -8) : uniform(0, 15) - (affine ? 0 : 8));
    if (!affine)
      for (uint8_t& c : codes) c = uniform(0, 99) < zeros ? uint8_t{0} : c;
    std::vector<uint16_t> scale(static_cast<size_t>(n * layout.groups()));
    std::vector<uint8_t> zero(scale.size());
    for (uint16_t& s : scale) s = static_cast<uint16_t>(uniform(0, 1) * 0x8000 + uniform(0, 0x3fff));
    for (uint8_t& z : zero) z = static_cast<uint8_t>(extreme ? 0 : uniform(0, 15));
    fs::u4::pack(layout, codes.data(), k, 1, scale.data(), zero.data(), pack.data());
    fs::u4::Layout read{};
    if (!fs::u4::header_error(pack.data(), bytes, &read).empty() || !fs::u4::content_error(layout, pack.data()).empty())
      fail(*rows.front(), "u4 " + shape(m, n, k) + ": its own pack is refused");
    std::vector<uint8_t> codes_back(codes.size()), zero_back(zero.size());
    std::vector<uint16_t> scale_back(scale.size());
    fs::u4::unpack(layout, pack.data(), codes_back.data(), scale_back.data(), zero_back.data());
    if (codes_back != codes || scale_back != scale || (affine && zero_back != zero))
      fail(*rows.front(), "u4 " + shape(m, n, k) + ": unpack gives something else");
    if (!affine) {
      const std::vector<uint8_t> bytes_of_it = fs::bitmap_u4::pack(layout, pack.data());
      const auto length = static_cast<int64_t>(bytes_of_it.size());
      sparse = Guarded(bytes_of_it.size(), 0xee, pick({0, 8}));
      std::memcpy(sparse.data(), bytes_of_it.data(), bytes_of_it.size());
      if (!fs::bitmap_u4::header_error(sparse.data(), length, &bitmap).empty() ||
          !fs::bitmap_u4::content_error(sparse.data(), length).empty())
        fail(*rows.front(), "bitmap_u4 " + shape(m, n, k) + ": its own pack is refused");
    }
  } else {
    for (uint8_t& c : codes) c = static_cast<uint8_t>(extreme ? -128 : uniform(-128, 127));
    fs::vnni16::pack(reinterpret_cast<const int8_t*>(codes.data()), k, 1, n, k, pack.data());
  }
  Guarded scale(static_cast<size_t>(n) * 4, 0xff), bias(static_cast<size_t>(n) * 4, 0xff);
  for (int64_t j = 0; j < n; ++j) {
    const float s = random_x(0) * 0.01f, b = random_x(0);
    std::memcpy(scale.data() + 4 * j, &s, 4);
    std::memcpy(bias.data() + 4 * j, &b, 4);
  }
  a.x = x.data();
  a.x_stride = stride;
  a.m = m;
  a.n = n;
  a.k = k;
  a.weight = pack.data();
  a.weight_scale = u4 ? nullptr : reinterpret_cast<float*>(scale.data());
  a.bias = uniform(0, 1) ? reinterpret_cast<float*>(bias.data()) : nullptr;
  a.activation = static_cast<Activation>(uniform(0, 3));
  std::vector<uint8_t> expected;
  for (const Kernels* row : rows) {  // scalar first
    Guarded y(static_cast<size_t>(m * n) * size, 0x5a);
    a.y = y.data();
    weight_only_linear(*row, a);
    const std::string what = "weight_only_linear " + shape(m, n, k) + (u4 ? " u4" : " s8") + (affine ? " affine" : "") +
                             " group " + std::to_string(layout.group) + " dtype " +
                             std::to_string(static_cast<int>(a.dtype)) + " x kind " + std::to_string(kind);
    if (!y.margins_intact()) fail(*row, what + ": wrote outside y");
    std::vector<uint8_t> got = comparable(y, a.dtype);
    if (row == rows.front())
      expected = got;
    else if (got != expected)
      fail(*row, what + ": differs from scalar");
    if (!u4 || affine) continue;
    for (const BitmapKernels* fast : {static_cast<const BitmapKernels*>(nullptr), bitmap_kernels()}) {
      Guarded z(y.bytes, 0x5a);
      WeightOnlyArgs b = a;
      b.y = z.data();
      b.bitmap = &bitmap;
      b.bitmap_kernels = fast;
      weight_only_linear(*row, b);
      if (!z.margins_intact() || comparable(z, a.dtype) != expected)
        fail(*row,
             what + ", bitmap " + (fast == nullptr ? "plain" : "VBMI2") + ": differs from u4, or wrote outside y");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 200;
  generator.seed(argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 0);
  std::vector<const Kernels*> rows;
  std::string names;
  for (const Kernels* row : table())
    if (fs::isa::usable(row->level, row->features)) {
      rows.insert(rows.begin(), row);
      names = std::string(row->name) + " " + names;
    }
  for (int i = 0; i < cases && failures < 20; ++i) {
    check_linear(rows);
    check_matmul(rows);
    check_weight_only(rows);
  }
  std::printf("%d cases of int8_linear, int8_mm and weight_only_linear each; rows: %s; %d failures\n", cases,
              names.c_str(), failures);
  return failures == 0 ? 0 : 1;
}
