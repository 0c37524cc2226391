// sparse_int8_linear, part of the program of sparse_matmul: every row of its table that this CPU runs (those that a
// better one of their level hides, too) against plain loops. Sums are exact; the scalar row's epilogue is what all must
// match.
#pragma once
#include <cstring>
#include <vector>

#include "../../csrc/runtime/isa.h"
#include "../../csrc/sparse_matmul/formats/bitmap_s8.h"
#include "../../csrc/sparse_matmul/formats/blocks_s8.h"
#include "../../csrc/sparse_matmul/formats/windows_s8.h"
#include "../../csrc/sparse_matmul/int8_select.h"
#include "support.h"

namespace {

// The pack of a weight in a format (0: bitmap_s8, 32: windows_s8, else outputs of a block), taken apart into `args`;
// what is wrong, or
// "".
inline std::string pack_int8(const std::vector<int8_t>& weight, int64_t n, int64_t k, int64_t block, Guarded* memory,
                             fs::sparse_matmul::int8::LinearArgs* args) {
  using namespace fs::sparse_matmul;
  const bool bitmap = block == 0, windows = block == int8::kWindowOutputs;
  const std::vector<uint8_t> bytes = bitmap    ? bitmap_s8::pack(weight.data(), k, 1, n, k)
                                     : windows ? windows_s8::pack(weight.data(), k, 1, n, k)
                                               : blocks_s8::pack(weight.data(), k, 1, n, k, block);
  *memory = Guarded(bytes.size(), 0xff);
  std::memcpy(memory->data(), bytes.data(), bytes.size());
  fs::PackHeader header;
  std::memcpy(&header, bytes.data(), sizeof header);
  std::vector<int8_t> back(weight.size());
  args->layout = bitmap ? int8::Layout::bitmap : windows ? int8::Layout::windows : int8::Layout::blocks;
  const auto size = static_cast<int64_t>(bytes.size());
  const std::string error = bitmap    ? bitmap_s8::validate(header, memory->data(), size, &args->bitmap)
                            : windows ? windows_s8::validate(header, memory->data(), size, &args->windows)
                                      : blocks_s8::validate(header, memory->data(), size, &args->blocks);
  if (!error.empty()) return error;
  if (bitmap)
    bitmap_s8::unpack(args->bitmap, back.data());
  else if (windows)
    windows_s8::unpack(args->windows, back.data());
  else
    blocks_s8::unpack(args->blocks, back.data());
  return back == weight ? "" : "unpack differs";
}

inline void check_int8() {
  using namespace fs::sparse_matmul;
  const int64_t m = pick({1, 2, 3, 4, 5, 8, 9, 17, 33, 65}), n = pick({1, 15, 16, 31, 33, 64, 100, 257, 300});
  const int64_t k = pick({1, 3, 4, 8, 63, 130, 511, 516, 1030}), percent = pick({0, 50, 90, 100});
  std::vector<int8_t> weight(static_cast<size_t>(n * k));
  for (int8_t& w : weight) w = uniform(0, 99) < percent ? int8_t{0} : static_cast<int8_t>(uniform(-128, 127));
  // Codes are given: in each row one x is 127 times its scale, so that dynamic quantization finds them again.
  const auto floats = [](int64_t count) { return Guarded(static_cast<size_t>(count) * 4, 0xff); };
  Guarded x = floats(m * k), scale = floats(n), bias = floats(n);
  std::vector<int64_t> code(static_cast<size_t>(m * k));
  const auto at = [](Guarded& memory, int64_t i) -> float& { return reinterpret_cast<float*>(memory.data())[i]; };
  for (int64_t r = 0; r < m; ++r)
    for (int64_t i = 0; i < k; ++i) {
      const int64_t c = i == r % k ? 127 : uniform(-127, 127);
      code[static_cast<size_t>(r * k + i)] = c;
      at(x, r * k + i) = static_cast<float>(c) * 0.25f;
    }
  for (int64_t j = 0; j < n; ++j) {
    at(scale, j) = static_cast<float>(uniform(1, 100)) * 0.001f;
    at(bias, j) = static_cast<float>(uniform(-100, 100)) * 0.1f;
  }
  int8::LinearArgs args{};
  args.x = x.data();
  args.dtype = fs::DType::f32;
  args.x_stride = k;
  args.m = m;
  args.weight_scale = reinterpret_cast<float*>(scale.data());
  args.bias = uniform(0, 1) != 0 ? reinterpret_cast<float*>(bias.data()) : nullptr;
  args.activation = static_cast<fs::Activation>(uniform(0, 3));

  std::vector<float> expected(static_cast<size_t>(m * n));
  for (int64_t r = 0; r < m; ++r)
    for (int64_t j = 0; j < n; ++j) {
      int32_t acc[fs::int8_gemm::kMaxTileColumns] = {};
      for (int64_t i = 0; i < k; ++i)
        acc[0] += static_cast<int32_t>(code[static_cast<size_t>(r * k + i)]) * weight[static_cast<size_t>(j * k + i)];
      const float x_scale = 0.25f;
      fs::int8_gemm::EpilogueArgs e{};
      e.acc = acc;
      e.rows = e.columns = 1;
      e.x_scale = &x_scale;
      e.weight_scale = args.weight_scale + j;
      e.bias = args.bias == nullptr ? nullptr : args.bias + j;
      e.activation = args.activation;
      e.y = expected.data() + r * n + j;
      e.dtype = fs::DType::f32;
      e.y_stride = n;
      fs::int8_gemm::kScalar.epilogue(e);
    }
  for (const int64_t block : {0, 1, 4, 32}) {
    Guarded pack(0, 0);
    const std::string error = pack_int8(weight, n, k, block, &pack, &args);
    if (!error.empty()) {
      std::printf("FAILED: int8, block %ld, N=%ld K=%ld: %s\n", block, n, k, error.c_str());
      ++failures;
      continue;
    }
    for (const int8::Kernels* row : int8::table()) {
      if (!fs::isa::usable(row->level, row->features)) continue;
      Guarded y = floats(m * n);
      args.y = y.data();
      int8::linear(*row, args);
      const bool equal = std::memcmp(y.data(), expected.data(), expected.size() * 4) == 0;
      if (equal && y.margins_intact()) continue;
      std::printf("FAILED %s: int8, block %ld, M=%ld N=%ld K=%ld, %ld%% zeros, activation %d: %s\n", row->name, block,
                  m, n, k, percent, static_cast<int>(args.activation), equal ? "wrote outside y" : "differs");
      ++failures;
    }
  }
}

}  // namespace
