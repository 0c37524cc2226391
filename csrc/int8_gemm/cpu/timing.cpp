// The kernel's own time, without the dispatcher: what bandwidth bars are held against.
#include <stdexcept>
#include <vector>

#include "../../families.h"
#include "../../runtime/timing.h"
#include "../formats/vnni16.h"
#include "../select.h"

namespace fs {

double time_int8_linear(int64_t m, int64_t n, int64_t k, int64_t repeats, int64_t copies) {
  if (m < 1 || n < 1 || k < 1 || repeats < 1 || copies < 1 || k > int8_gemm::kMaxK)
    throw std::invalid_argument("time_int8_linear: m, n, k, repeats and copies must be positive, k at most 131071");
  const auto size = [](int64_t count) { return static_cast<size_t>(count); };
  std::vector<int8_t> weight(size(n * k));
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<int8_t>(static_cast<int>(i * 7919 % 255) - 127);
  std::vector<AlignedBytes> packs;
  for (int64_t i = 0; i < copies; ++i) {
    packs.push_back(allocate_pack(vnni16::pack_bytes(n, k)));
    vnni16::pack(weight.data(), k, 1, n, k, packs.back().get());
  }
  const AlignedBytes x = allocate_floats(m * k, 0.0f), y = allocate_floats(m * n, 0.0f);
  const AlignedBytes scale = allocate_floats(n, 0.01f), bias = allocate_floats(n, 0.5f);
  auto* values = reinterpret_cast<float*>(x.get());
  for (int64_t i = 0; i < m * k; ++i) values[i] = static_cast<float>(i % 1009) - 500.0f;
  int8_gemm::LinearArgs args{};
  args.x = x.get();
  args.x_stride = k;
  args.m = m;
  args.n = n;
  args.k = k;
  args.weight_scale = reinterpret_cast<const float*>(scale.get());
  args.bias = reinterpret_cast<const float*>(bias.get());
  args.dynamic = true;
  args.y = y.get();
  const int8_gemm::Kernels& kernels = int8_gemm::select();
  const auto run = [&](int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      args.weight = packs[size(i % copies)].get();
      int8_gemm::linear(kernels, args);
    }
  };
  return seconds_a_call(copies, repeats, run);
}

}  // namespace fs
