// Holds every row of the sparse_matmul table that this CPU runs against plain loops, bit for bit, in all formats;
// without torch, so that it is a small static program which an instruction emulator can run too (that is how the
// AVX-512 row is checked where no CPU at hand has it: docs/kernels/sparse_matmul.md). Inputs lie between poisoned
// margins and outputs between canaries: a read outside changes a result, a write shows.
//
// Usage: sparse_matmul [cases] [seed]. Exit status 0: all equal.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/sparse_matmul/formats/sparse.h"
#include "../../csrc/sparse_matmul/select.h"
#include "../../csrc/sparse_matmul/sparse_matmul.h"
#include "sparse_int8.h"
#include "support.h"

namespace {

using namespace fs::sparse_matmul;
float normal() { return std::normal_distribution<float>()(generator); }

// `count` floats between margins of NaN.
struct Floats : Guarded {
  explicit Floats(int64_t count) : Guarded(static_cast<size_t>(count) * sizeof(float), 0xff) {}
  float* data() { return reinterpret_cast<float*>(Guarded::data()); }
};

void check(const std::vector<const Kernels*>& rows) {
  const int64_t m = pick({1, 2, 3, 4, 5, 8, 9, 17, 33, 50, 65}), n = pick({1, 15, 16, 31, 33, 64, 100, 257, 300, 520});
  const int64_t k = pick({0, 1, 3, 8, 63, 191, 192, 193, 400}), stride = k + pick({0, 3});
  const int64_t percent = pick({0, 50, 90, 100});
  Floats x(m * stride), bias(n);
  std::vector<float> weight(static_cast<size_t>(n * k));
  for (int64_t r = 0; r < m; ++r)
    for (int64_t i = 0; i < k; ++i) x.data()[r * stride + i] = normal();
  for (int64_t j = 0; j < n; ++j) bias.data()[j] = normal();
  for (float& w : weight) w = uniform(0, 99) < percent ? 0.0f : normal();
  const int64_t kept = pick({1, 2, 4});  // of every 4: below 4, the nm formats take the weight, too
  for (int64_t j = 0; j < n * k && kept < 4; ++j)
    if ((j % k % 4 + j / k + j % k / 4) % 4 >= kept) weight[static_cast<size_t>(j)] = 0;
  const bool with_bias = uniform(0, 1) != 0;
  const auto activation = static_cast<fs::Activation>(uniform(0, 3));

  std::vector<float> expected(static_cast<size_t>(m * n));
  for (int64_t r = 0; r < m; ++r)
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0;
      for (int64_t i = 0; i < k; ++i) {
        const float w = weight[static_cast<size_t>(j * k + i)];
        if (w != 0) sum = std::fma(w, x.data()[r * stride + i], sum);
      }
      expected[static_cast<size_t>(r * n + j)] = sum;
    }
  for (int64_t r = 0; r < m; ++r) {
    float* y = expected.data() + r * n;
    rows.front()->finish({y, with_bias ? bias.data() : nullptr, activation, n, y});  // the scalar row's epilogue
  }
  struct Layout {
    int format, block, most;  // most: non-zeros in 4 consecutive k
  };
  for (const auto [format, block, most] :
       {Layout{kBitmap32, 0, 4}, Layout{kSell16, 0, 4}, Layout{kPanels128, 0, 4}, Layout{kBlocks, 0x0104, 4},
        Layout{kBlocks, 0x0404, 4}, Layout{kBlocks, 0x0808, 4}, Layout{kBlocks, 0x1010, 4}, Layout{kBlocks, 0x1001, 4},
        Layout{kNm, 0x0104, 1}, Layout{kNm, 0x0204, 2}, Layout{kNm, 0x0408, 2}}) {
    if (kept > most) continue;
    const std::vector<uint8_t> bytes = formats::pack(*formats::find(format, block), weight.data(), k, 1, n, k);
    std::vector<float> back(weight.size());
    LinearArgs args{};
    const auto size = static_cast<int64_t>(bytes.size());
    const std::string error = formats::validate(bytes.data(), size) + formats::view(bytes.data(), size, &args.weight);
    if (error.empty()) formats::unpack(args.weight, back.data());
    if (!error.empty() || back != weight) {
      std::printf("FAILED: format %d, N=%ld K=%ld: %s\n", format, n, k,
                  error.empty() ? "unpack differs" : error.c_str());
      ++failures;
      continue;
    }
    for (const Kernels* row : rows) {
      Floats y(m * n);
      args.x = x.data();
      args.x_stride = stride;
      args.m = m;
      args.bias = with_bias ? bias.data() : nullptr;
      args.activation = activation;
      args.y = y.data();
      linear(*row, args);
      const bool equal = std::memcmp(y.data(), expected.data(), expected.size() * 4) == 0;
      if (equal && y.margins_intact()) continue;
      std::printf("FAILED %s: format %d, M=%ld N=%ld K=%ld, %ld%% zeros, activation %d: %s\n", row->name, format, m, n,
                  k, percent, static_cast<int>(activation), equal ? "wrote outside y" : "differs");
      ++failures;
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
  for (int i = 0; i < cases && failures < 20; ++i) check(rows);
  for (int i = 0; i < cases && failures < 20; ++i) check_int8();
  std::printf("%d cases of sparse_linear and of sparse_int8_linear in all formats; rows: %s; %d failures\n", cases,
              names.c_str(), failures);
  return failures == 0 ? 0 : 1;
}
