// Holds every row of the qdq table that this CPU runs against the scalar row, bit for bit, and the scalar row against
// plain loops; without torch, so that it is a small static program which an instruction emulator can run too.
// Inputs lie between poisoned margins and outputs between canaries: a read outside changes a result, a write shows.
//
// Usage: qdq [cases] [seed]. Exit status 0: all equal.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/qdq/qdq.h"
#include "../../csrc/qdq/select.h"
#include "support.h"

namespace {

using namespace fs::qdq;

float random_x(int kind) {
  const float normal = std::normal_distribution<float>()(generator) * 2;
  switch (kind) {
    case 0: return normal;
    case 1: return normal * 1e-39f;
    case 2: return normal * 1e37f;
    default:
      return uniform(0, 40) == 0 ? std::nanf("") : uniform(0, 40) == 0 ? (normal > 0 ? INFINITY : -INFINITY) : normal;
  }
}

void fill_x(uint8_t* x, DType dtype, int64_t count, int kind) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = random_x(kind);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == DType::f32) {
      std::memcpy(x + 4 * i, &value, 4);
      continue;
    }
    const uint16_t half =
        dtype == DType::bf16
            ? static_cast<uint16_t>(bits >> 16)
            : static_cast<uint16_t>(kind == 3 ? uniform(0, 65535) : uniform(0, 1) * 0x8000 + uniform(0x2000, 0x47ff));
    std::memcpy(x + 2 * i, &half, 2);
  }
}

// The bits of a NaN are no result: all NaNs are made one.
void unify_nans(std::vector<uint8_t>& values, DType dtype) {
  const size_t size = dtype == DType::f32 ? 4 : 2;
  for (size_t i = 0; i + size <= values.size(); i += size) {
    uint32_t bits = 0;
    std::memcpy(&bits, &values[i], size);
    const bool nan = dtype == DType::f32    ? (bits & 0x7fffffff) > 0x7f800000
                     : dtype == DType::bf16 ? (bits & 0x7fff) > 0x7f80
                                            : (bits & 0x7fff) > 0x7c00;
    if (nan) std::memset(&values[i], 0xff, size);
  }
}

// An output of one row, checked against the first row's; `dtype` where it holds floats.
void compare(const Kernels& row, bool first, Guarded& got, std::vector<uint8_t>& expected, const std::string& what,
             const DType* dtype = nullptr) {
  if (!got.margins_intact()) fail(row, what + ": wrote outside");
  std::vector<uint8_t> bytes(got.data(), got.data() + got.bytes);
  if (dtype) unify_nans(bytes, *dtype);
  if (first)
    expected = bytes;
  else if (bytes != expected)
    fail(row, what + ": differs from scalar");
}

void check_per_token(const std::vector<const Kernels*>& rows) {
  const int64_t m = pick({1, 2, 3, 7, 61, 600});
  const int64_t k = pick({0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000});
  const int64_t stride = k + pick({0, 0, 3});
  const int kind = static_cast<int>(uniform(0, 3));
  const auto dtype = static_cast<DType>(uniform(0, 2));
  const int64_t size = dtype == DType::f32 ? 4 : 2;
  Guarded x(m * stride * size, 0xff, pick({0, 4}));  // 0xffff.. is a NaN in each of the three types
  for (int64_t r = 0; r < m; ++r)
    if (uniform(0, 9) != 0)
      fill_x(x.data() + r * stride * size, dtype, k, kind);
    else
      std::memset(x.data() + r * stride * size, 0, static_cast<size_t>(k * size));
  std::vector<uint8_t> expected_codes, expected_scale;
  const bool streamed = uniform(0, 1) != 0;
  const int64_t shift = pick({0, 1, 32});
  for (const Kernels* row : rows) {
    Guarded codes(m * k, 0x5a, shift), scale(m * 4, 0x5a);
    TokenArgs a{
        x.data(), dtype, stride, m, k, reinterpret_cast<int8_t*>(codes.data()), reinterpret_cast<float*>(scale.data()),
        streamed};
    if (streamed)
      row->quantize_per_token(a);
    else
      quantize_per_token(*row, a);
    const std::string what = "quantize_per_token M=" + std::to_string(m) + " K=" + std::to_string(k) + " dtype " +
                             std::to_string(static_cast<int>(dtype)) + " kind " + std::to_string(kind) +
                             (streamed ? " streamed" : "");
    const DType f32 = DType::f32;
    compare(*row, row == rows.front(), codes, expected_codes, what + " codes");
    compare(*row, row == rows.front(), scale, expected_scale, what + " scale", &f32);
    if (row != rows.front() || dtype != DType::f32) continue;
    for (int64_t r = 0; r < m; ++r) {  // the scalar row against the formula
      const float* values = reinterpret_cast<const float*>(x.data()) + r * stride;
      float absmax = 0;
      bool finite = true;
      for (int64_t i = 0; i < k; ++i) {
        finite = finite && std::isfinite(values[i]);
        absmax = std::max(absmax, std::fabs(values[i]));
      }
      float s = absmax == 0 ? 1.0f : std::max(absmax / 127.0f, FLT_MIN), got;
      std::memcpy(&got, scale.data() + 4 * r, 4);
      bool right = finite ? got == s : std::isnan(got);
      for (int64_t i = 0; i < k; ++i)
        right = right && static_cast<int8_t>(codes.data()[r * k + i]) ==
                             (finite ? static_cast<int>(std::nearbyint(values[i] * (1.0f / s))) : 0);
      if (!right) fail(*row, what + ": not what the formula gives, row " + std::to_string(r));
    }
  }
}

void check_maps(const std::vector<const Kernels*>& rows) {
  const Channels shape = [] {
    switch (uniform(0, 3)) {
      case 0: return Channels{1, 1, pick({1, 7, 33, 64, 65, 1000, 40001})};
      case 1: return Channels{pick({1, 2, 5}), pick({2, 3, 17}), pick({64, 65, 100, 127, 4099})};
      case 2: return Channels{pick({1, 3, 300}), pick({2, 17, 33, 1025, 2100}), 1};
      default: return Channels{pick({1, 3, 9}), pick({2, 40, 700}), pick({2, 9, 27, 63})};
    }
  }();
  const int64_t n = shape.outer * shape.channels * shape.inner;
  const auto dtype = static_cast<DType>(uniform(0, 2));
  const int64_t size = dtype == DType::f32 ? 4 : 2;
  const int kind = static_cast<int>(uniform(0, 3));
  const int bits = static_cast<int>(uniform(2, 8));
  const int32_t highest = (1 << (bits - 1)) - 1, lowest = -highest - 1;
  Guarded x(n * size, 0xff, pick({0, 4})), scale(shape.channels * 4, 0xff), zero(shape.channels * 4, 0x7f);
  fill_x(x.data(), dtype, n, kind);
  const float spread = kind == 1 ? FLT_MIN : kind == 2 ? 1e36f : 0.03f;
  for (int64_t c = 0; c < shape.channels; ++c) {
    const float s = std::max(FLT_MIN, spread * static_cast<float>(uniform(1, 1000)) / 1000.0f);
    const auto z = static_cast<int32_t>(uniform(lowest, highest));
    std::memcpy(scale.data() + 4 * c, &s, 4);
    std::memcpy(zero.data() + 4 * c, &z, 4);
  }
  const Parameters p{shape, reinterpret_cast<float*>(scale.data()),
                     uniform(0, 3) ? reinterpret_cast<int32_t*>(zero.data()) : nullptr};
  const Rows view = rows_of(shape);
  const std::string what = " [" + std::to_string(shape.outer) + ", " + std::to_string(shape.channels) + ", " +
                           std::to_string(shape.inner) + "] dtype " + std::to_string(static_cast<int>(dtype)) +
                           " kind " + std::to_string(kind) + " bits " + std::to_string(bits);
  std::vector<uint8_t> expected_codes, expected_back, expected_y, expected_mask, expected_grad;
  const int64_t shift = pick({0, 4});
  for (const Kernels* row : rows) {
    const bool first = row == rows.front();
    Guarded codes(n, 0x5a, shift), back(n * size, 0x5a, shift), y(n * size, 0x5a, shift), grad(n * size, 0x5a, shift);
    Guarded mask(view.rows * mask_bytes(view.length), 0x5a);
    quantize(*row, x.data(), dtype, p, reinterpret_cast<int8_t*>(codes.data()));
    compare(*row, first, codes, expected_codes, "quantize" + what);
    dequantize(*row, reinterpret_cast<int8_t*>(codes.data()), p, back.data(), dtype);
    compare(*row, first, back, expected_back, "dequantize" + what, &dtype);
    fake_quantize(*row, x.data(), dtype, p, lowest, highest, y.data(), mask.data());
    compare(*row, first, y, expected_y, "fake_quantize" + what, &dtype);
    compare(*row, first, mask, expected_mask, "fake_quantize mask" + what);
    fake_quantize_grad(*row, x.data(), dtype, view.rows, view.length, mask.data(), grad.data());
    compare(*row, first, grad, expected_grad, "fake_quantize_grad" + what, &dtype);
    if (bits == 8 && y.margins_intact()) {  // with 8 bits, fake_quantize is dequantize(quantize(x))
      std::vector<uint8_t> a(back.data(), back.data() + back.bytes), b(y.data(), y.data() + y.bytes);
      unify_nans(a, dtype);
      unify_nans(b, dtype);
      if (a != b) fail(*row, "fake_quantize" + what + ": is not dequantize(quantize(x))");
    }
    // Streaming stores, which only large tensors get: the kernels themselves, over one row.
    if (view.rows == 1 && !view.varying) {
      MapArgs m{};
      m.in = x.data();
      m.out = y.data();
      m.dtype = dtype;
      m.mask = mask.data();
      m.rows = 1;
      m.length = m.stride = n;
      m.scale = p.scale;
      m.zero_point = p.zero_point;
      m.channels = 1;
      m.lowest = lowest;
      m.highest = highest;
      m.stream = true;
      row->fake_quantize(m);
      compare(*row, first, y, expected_y, "streamed fake_quantize" + what, &dtype);
      m.out = grad.data();
      row->fake_quantize_grad(m);
      compare(*row, first, grad, expected_grad, "streamed fake_quantize_grad" + what, &dtype);
      m.out = codes.data();
      row->quantize(m);
      compare(*row, first, codes, expected_codes, "streamed quantize" + what);
      m.in = codes.data();
      m.out = back.data();
      row->dequantize(m);
      compare(*row, first, back, expected_back, "streamed dequantize" + what, &dtype);
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
    check_per_token(rows);
    check_maps(rows);
  }
  std::printf("%d cases of quantize_per_token and of the other ops each; rows: %s; %d failures\n", cases, names.c_str(),
              failures);
  return failures == 0 ? 0 : 1;
}
