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

#include "../../csrc/sparse_matmul/formats/bitmap16.h"
#include "../../csrc/sparse_matmul/formats/sparse.h"
#include "../../csrc/sparse_matmul/formats/structure.h"
#include "../../csrc/sparse_matmul/select.h"
#include "../../csrc/sparse_matmul/sparse_matmul.h"
#include "../../csrc/sparse_matmul/training.h"
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
  const bool uneven = uniform(0, 1) != 0;  // a few outputs with all their weights
  for (int64_t j = 0; j < n * k; ++j)
    weight[static_cast<size_t>(j)] = uniform(0, 99) < percent && !(uneven && j / k % 40 == 7) ? 0.0f : normal();
  const int64_t kept = pick({1, 2, 4});  // of every 4: below 4, the nm formats take the weight, too
  for (int64_t j = 0; j < n * k && kept < 4; ++j)
    if ((j % k % 4 + j / k + j % k / 4) % 4 >= kept) weight[static_cast<size_t>(j)] = 0;
  // In half of the cases all weights are bfloat16, and a pack of that is among them.
  const bool bf16 = uniform(0, 1) != 0;
  std::vector<uint16_t> halves(weight.size());
  for (size_t i = 0; bf16 && i < weight.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &weight[i], 4);
    halves[i] = static_cast<uint16_t>(bits >> 16);
    bits &= 0xffff0000;
    std::memcpy(&weight[i], &bits, 4);
  }
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
  constexpr int kBf16 = 0, kSell8OfBf16 = 1;  // bitmap32, sell8 of bfloat16
  for (const auto [format, block, most] :
       {Layout{kBitmap32, 0, 4}, Layout{kSell16, 0, 4}, Layout{kPanels128, 0, 4}, Layout{kSell8, 64, 4},
        Layout{kSell8, 32, 4}, Layout{kSell8, 16, 4}, Layout{kSell4, 0, 4}, Layout{kSell8OfBf16, 64, 4},
        Layout{kSell8OfBf16, 32, 4}, Layout{kBf16, 0, 4}, Layout{kBlocks, 0x0104, 4}, Layout{kBlocks, 0x0404, 4},
        Layout{kBlocks, 0x0808, 4}, Layout{kBlocks, 0x1010, 4}, Layout{kBlocks, 0x1001, 4}, Layout{kNm, 0x0104, 1},
        Layout{kNm, 0x0204, 2}, Layout{kNm, 0x0408, 2}}) {
    if (kept > most || ((format == kBf16 || format == kSell8OfBf16) && !bf16)) continue;
    const auto* const packed =
        format == kSell8OfBf16 ? formats::find(kSell8, block, formats::kDTypeBf16) : formats::find(format, block);
    const std::vector<uint8_t> bytes = format == kBf16 ? bitmap16::pack(halves.data(), k, 1, n, k, fs::DType::bf16)
                                                       : formats::pack(*packed, weight.data(), k, 1, n, k);
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

// The sum that training.h states for one value: p and q are columns, `stride` apart.
float sampled(const float* p, int64_t p_stride, const float* q, int64_t q_stride, int64_t m) {
  float total = 0;
  for (int64_t begin = 0; begin < m; begin += kSampleRows) {
    float lane[16];
    for (int64_t i = 0; i < kSampleRows; ++i) {  // the lanes that a smaller panel leaves out add zeros
      const bool inside = begin + i < m;
      const float a = inside ? p[(begin + i) * p_stride] : 0, b = inside ? q[(begin + i) * q_stride] : 0;
      lane[i % 16] = i < 16 ? a * b : std::fma(a, b, lane[i % 16]);
    }
    float h[4];
    for (int i = 0; i < 4; ++i) h[i] = (lane[4 * i] + lane[4 * i + 2]) + (lane[4 * i + 1] + lane[4 * i + 3]);
    const float part = (h[0] + h[2]) + (h[1] + h[3]);
    total = begin == 0 ? part : total + part;
  }
  return total;
}

void check_training(const std::vector<const Kernels*>& rows) {
  const int64_t m = pick({1, 5, 16, 17, 33, 64, 65, 300}), n = pick({1, 16, 33, 257}), k = pick({1, 63, 128, 130});
  const int64_t percent = pick({0, 50, 90, 100});
  Floats x(m * k), grad(m * n);
  for (int64_t i = 0; i < m * k; ++i) x.data()[i] = normal();
  for (int64_t i = 0; i < m * n; ++i) grad.data()[i] = normal();
  std::vector<int64_t> crow{0}, col;
  std::vector<float> dense(static_cast<size_t>(n * k));
  std::vector<float> kept;
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      if (uniform(0, 99) < percent) continue;
      col.push_back(c);
      kept.push_back(normal());
      dense[static_cast<size_t>(r * k + c)] = kept.back();
    }
    crow.push_back(static_cast<int64_t>(col.size()));
  }
  const auto nonzeros = static_cast<int64_t>(col.size());
  Floats values(nonzeros);
  std::copy(kept.begin(), kept.end(), values.data());
  const formats::Csr csr{crow.data(), col.data(), n, k, nonzeros};
  const std::vector<uint8_t> bytes = formats::pack_structure(csr);
  std::vector<int64_t> crow_back, col_back;
  StructureView view;
  const auto size = static_cast<int64_t>(bytes.size());
  const std::string error = formats::check_csr(csr) +
                            formats::read_structure(bytes.data(), size, &crow_back, &col_back) +
                            formats::view_structure(bytes.data(), size, &view);
  if (!error.empty() || crow_back != crow || col_back != col) {
    std::printf("FAILED: structure, N=%ld K=%ld: %s\n", n, k, error.empty() ? "read differs" : error.c_str());
    ++failures;
    return;
  }
  std::vector<float> y(static_cast<size_t>(m * n)), grad_x(static_cast<size_t>(m * k)), sums(kept.size());
  for (int64_t r = 0; r < m; ++r)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < k; ++i) {
        const float w = dense[static_cast<size_t>(j * k + i)];
        if (w == 0) continue;
        float& to = y[static_cast<size_t>(r * n + j)];
        to = std::fma(w, x.data()[r * k + i], to);
        float& back = grad_x[static_cast<size_t>(r * k + i)];
        back = std::fma(w, grad.data()[r * n + j], back);
      }
  for (int64_t r = 0; r < n; ++r)
    for (int64_t i = crow[static_cast<size_t>(r)]; i < crow[static_cast<size_t>(r + 1)]; ++i)
      sums[static_cast<size_t>(i)] = sampled(grad.data() + r, n, x.data() + col[static_cast<size_t>(i)], k, m);
  for (const Kernels* row : rows) {
    const auto equal = [&](const char* what, Floats& got, const std::vector<float>& wanted) {
      const bool same = wanted.empty() || std::memcmp(got.data(), wanted.data(), wanted.size() * 4) == 0;
      if (same && got.margins_intact()) return;
      std::printf("FAILED %s: %s, M=%ld N=%ld K=%ld, %ld%% zeros: %s\n", row->name, what, m, n, k, percent,
                  same ? "wrote outside" : "differs");
      ++failures;
    };
    Floats y_got(m * n), x_got(m * k), sums_got(nonzeros);
    product(*row, {&view, values.data(), false, x.data(), k, m, nullptr, fs::Activation::none, y_got.data()});
    equal("product", y_got, y);
    product(*row, {&view, values.data(), true, grad.data(), n, m, nullptr, fs::Activation::none, x_got.data()});
    equal("transposed product", x_got, grad_x);
    sample(*row, {&view, {grad.data(), n, 1}, {x.data(), k, 1}, m, sums_got.data()});
    equal("sample", sums_got, sums);
  }
  // Damaged: any numbers, but nothing outside (a sanitizer sees reads, too).
  std::vector<uint8_t> bad = bytes;
  for (int i = 0; i < 20; ++i) bad[static_cast<size_t>(uniform(80, size - 1))] = static_cast<uint8_t>(uniform(0, 255));
  if (!formats::view_structure(bad.data(), size, &view).empty()) return;
  for (const Kernels* row : rows) {
    Floats y_got(m * n), x_got(m * k), sums_got(nonzeros);
    product(*row, {&view, values.data(), false, x.data(), k, m, nullptr, fs::Activation::none, y_got.data()});
    product(*row, {&view, values.data(), true, grad.data(), n, m, nullptr, fs::Activation::none, x_got.data()});
    sample(*row, {&view, {grad.data(), n, 1}, {x.data(), k, 1}, m, sums_got.data()});
    if (!y_got.margins_intact() || !x_got.margins_intact() || !sums_got.margins_intact())
      fail(*row, "a damaged structure made it write outside");
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
  for (int i = 0; i < cases / 4 && failures < 20; ++i) check_training(rows);
  std::printf("%d cases of sparse_linear and of sparse_int8_linear in all formats; rows: %s; %d failures\n", cases,
              names.c_str(), failures);
  return failures == 0 ? 0 : 1;
}
