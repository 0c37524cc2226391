// The kernel's own time, without the dispatcher: what bandwidth bars are held against.
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../../families.h"
#include "../../runtime/timing.h"
#include "../formats/u4.h"
#include "../formats/vnni16.h"
#include "../select.h"

namespace fs {

double time_weight_only_linear(int64_t m, int64_t n, int64_t k, int64_t bits, int64_t group, int64_t repeats,
                               int64_t copies) {
  if (m < 1 || n < 1 || k < 1 || repeats < 1 || copies < 1 || k > int8_gemm::kMaxK ||
      !(bits == 8 || (bits == 4 && u4::is_group(group))))
    throw std::invalid_argument(
        "time_weight_only_linear: m, n, k, repeats and copies must be positive, k at most 131071, bits 8, or 4 with a "
        "group of 32, 64 or 128");
  const auto size = [](int64_t count) { return static_cast<size_t>(count); };
  const u4::Layout layout{n, k, group, false};
  std::vector<int8_t> weight(size(n * k));
  const int range = bits == 8 ? 255 : 16;
  for (size_t i = 0; i < weight.size(); ++i)
    weight[i] = static_cast<int8_t>(static_cast<int>(i * 7919 % static_cast<size_t>(range)) - range / 2);
  const std::vector<uint16_t> half(bits == 8 ? 0 : size(n * layout.groups()), 0x211f);  // 0.01
  const int64_t bytes = bits == 8 ? vnni16::pack_bytes(n, k) : layout.bytes();
  std::vector<AlignedBytes> packs;
  for (int64_t i = 0; i < copies; ++i) {
    packs.push_back(allocate_pack(bytes));
    if (i > 0)
      std::memcpy(packs.back().get(), packs.front().get(), size(bytes));
    else if (bits == 8)
      vnni16::pack(weight.data(), k, 1, n, k, packs.back().get());
    else
      u4::pack(layout, reinterpret_cast<const uint8_t*>(weight.data()), k, 1, half.data(), nullptr, packs.back().get());
  }
  std::vector<float> x(size(m * k)), scale(size(n), 0.01f), bias(size(n), 0.5f), y(size(m * n));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 1009) - 500.0f;
  int8_gemm::WeightOnlyArgs args{
      x.data(),    int8_gemm::DType::f32,       k,       m, n, k, nullptr, bits == 8 ? scale.data() : nullptr,
      bias.data(), int8_gemm::Activation::none, y.data()};
  const int8_gemm::Kernels& kernels = int8_gemm::select();
  const auto run = [&](int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      args.weight = packs[size(i % copies)].get();
      int8_gemm::weight_only_linear(kernels, args);
    }
  };
  return seconds_a_call(copies, repeats, run);
}

}  // namespace fs
