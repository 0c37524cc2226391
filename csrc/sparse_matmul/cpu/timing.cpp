// The kernel's own time, without the dispatcher.
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../../families.h"
#include "../../runtime/timing.h"
#include "../formats/sparse.h"
#include "../select.h"

namespace fs {

double time_sparse_linear(int64_t m, int64_t n, int64_t k, double density, int64_t format, int64_t repeats,
                          int64_t copies) {
  using namespace sparse_matmul;
  const formats::PackedFormat* const packed = formats::find(format);
  if (m < 1 || n < 1 || k < 1 || repeats < 1 || copies < 1 || packed == nullptr)
    throw std::invalid_argument("time_sparse_linear: m, n, k, repeats and copies must be positive, format " +
                                formats::known());
  const auto size = [](int64_t count) { return static_cast<size_t>(count); };
  std::vector<float> weight(size(n * k)), x(size(m * k), 0.5f), bias(size(n), 0.5f), y(size(m * n));
  uint64_t state = 1;
  for (float& w : weight) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    w = static_cast<double>(state >> 40) < density * 16777216.0 ? 0.01f : 0.0f;
  }
  const std::vector<uint8_t> one = formats::pack(*packed, weight.data(), k, 1, n, k);
  std::vector<AlignedBytes> packs;
  for (int64_t i = 0; i < copies; ++i) {
    packs.push_back(allocate_pack(static_cast<int64_t>(one.size())));
    std::memcpy(packs.back().get(), one.data(), one.size());
  }
  LinearArgs args{{}, x.data(), k, m, bias.data(), Activation::none, y.data()};
  const Kernels& kernels = select();
  const auto run = [&](int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      formats::view(packs[size(i % copies)].get(), static_cast<int64_t>(one.size()), &args.weight);
      linear(kernels, args);
    }
  };
  return seconds_a_call(copies, repeats, run);
}

}  // namespace fs
