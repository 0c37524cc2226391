#include "info.h"

#include <chrono>
#include <stdexcept>

#include "../int8_gemm/formats/vnni16.h"
#include "../int8_gemm/select.h"
#if defined(FASTSPARSE_WITH_CUDA)
#include "../int8_gemm/cuda/sm80.h"
#endif
#include "isa.h"
#include "workspace.h"

#define FS_STRING_OF(x) #x
#define FS_STRING(x) FS_STRING_OF(x)

namespace fs {

std::map<std::string, std::string> build_info() {
  return {
      {"version", FS_STRING(FASTSPARSE_VERSION)},
      {"built_with_torch", FS_STRING(FASTSPARSE_BUILT_WITH_TORCH)},
      {"compiler", __VERSION__},
      {"cuda", FS_STRING(FASTSPARSE_CUDA_VERSION)},  // "off", or the toolkit's version
      {"sanitize", FS_STRING(FASTSPARSE_SANITIZE)},
  };
}

std::vector<KernelInfo> kernels() {
  std::vector<KernelInfo> out;
  const std::string selected = int8_gemm::select().name;
  for (const int8_gemm::Kernels* row : int8_gemm::table()) {
    const std::string tile = std::to_string(row->max_rows) + "x" + std::to_string(row->many_columns) + ", " +
                             std::to_string(row->few_rows) + "x" + std::to_string(row->few_columns);
    out.push_back({"int8_gemm", row->name, isa::level_name(row->level), tile, isa::usable(row->level, row->features),
                   row->name == selected, true});
  }
#if defined(FASTSPARSE_WITH_CUDA)
  out.push_back({"int8_gemm", int8_gemm::sm80::kName, "cuda", "64x64", true, true, int8_gemm::sm80::kProven});
#endif
  return out;
}

int64_t scratch_allocations() { return allocation_count().load(); }

void spoil_kernel(const std::string& family, const std::string& name) {
  if (family != "int8_gemm") throw std::invalid_argument("spoil_kernel: family must be int8_gemm, got " + family);
  int8_gemm::spoil(name);
}

double time_int8_linear(int64_t m, int64_t n, int64_t k, int64_t repeats, int64_t copies) {
  if (m < 1 || n < 1 || k < 1 || repeats < 1 || copies < 1 || k > int8_gemm::kMaxK)
    throw std::invalid_argument("time_int8_linear: m, n, k, repeats and copies must be positive, k at most 131071");
  std::vector<int8_t> weight(static_cast<size_t>(n * k));
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<int8_t>(i * 7919 % 255 - 127);
  std::vector<AlignedBytes> packs;
  for (int64_t i = 0; i < copies; ++i) {
    packs.push_back(allocate_aligned(static_cast<size_t>(vnni16::pack_bytes(n, k))));
    vnni16::pack(weight.data(), k, 1, n, k, packs.back().get());
  }
  std::vector<float> x(static_cast<size_t>(m * k)), scale(static_cast<size_t>(n), 0.01f), bias(static_cast<size_t>(n), 0.5f),
      y(static_cast<size_t>(m * n));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 1009) - 500.0f;
  int8_gemm::LinearArgs args{x.data(), int8_gemm::DType::f32, k, m, n, k, nullptr, scale.data(), bias.data(),
                             int8_gemm::Activation::none, true, 1.0f, 0, y.data()};
  const int8_gemm::Kernels& kernels = int8_gemm::select();
  for (const AlignedBytes& pack : packs) {
    args.weight = pack.get();
    int8_gemm::linear(kernels, args);
  }
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < repeats; ++i) {
    args.weight = packs[static_cast<size_t>(i % copies)].get();
    int8_gemm::linear(kernels, args);
  }
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
  return elapsed.count() / static_cast<double>(repeats);
}

}  // namespace fs
