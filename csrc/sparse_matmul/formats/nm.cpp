#include "nm.h"

#include <cstring>
#include <stdexcept>

namespace fs::sparse_matmul::formats {
namespace {

constexpr int64_t kOutputs = 16;  // of a run

template <int64_t kN, int64_t kM>
struct Shape {
  static constexpr int kBits = kM == 4 ? 2 : 4;
  static constexpr int64_t kValues = 32 / kBits, kGroups = kValues / kN, kWidth = kGroups * kM;
  static constexpr int64_t kBytes = 4 * kOutputs * (1 + kValues);
  static int64_t runs(int64_t n, int64_t k) { return ceil_div(n, kOutputs) * ceil_div(k, kWidth); }
};

template <int64_t kN, int64_t kM>
const PackedFormat& format_of() {
  return kN == 1 ? kNm14 : kN == 2 ? kNm24 : kNm48;
}

[[noreturn]] void refuse(const PackedFormat& format, int64_t n, int64_t m, int64_t found, int64_t row, int64_t k) {
  const auto text = [](int64_t number) { return std::to_string(number); };
  throw std::invalid_argument("sparse_pack: weight must have at most " + text(n) + " of every " + text(m) +
                              " consecutive k not zero for " + format.name + ", got " + text(found) + " in row " +
                              text(row) + ", k " + text(k) + " to " + text(k + m - 1));
}

// A group of a row: its values and positions to a run.
template <int64_t kN, int64_t kM>
void write_group(const Source& s, int64_t row, int64_t k, int64_t group, uint32_t* word, float* value) {
  bool keep[kM];
  int64_t count = 0;
  for (int64_t i = 0; i < kM; ++i) count += keep[i] = k + i < s.k && s.at(row, k + i) != 0.0f;
  if (count > kN) refuse(format_of<kN, kM>(), kN, kM, count, row, k);
  for (int64_t i = 0; count < kN; ++i)
    if (!keep[i]) {
      keep[i] = true;
      ++count;
    }
  int64_t at = group * kN;
  for (int64_t i = 0; i < kM; ++i) {
    if (!keep[i]) continue;
    *word |= static_cast<uint32_t>(i) << (Shape<kN, kM>::kBits * at);
    const float w = k + i < s.k ? s.at(row, k + i) : 0.0f;
    value[at * kOutputs] = w == 0.0f ? 0.0f : w;  // no -0
    ++at;
  }
}

template <int64_t kN, int64_t kM>
std::vector<uint8_t> pack(const Source& s) {
  using S = Shape<kN, kM>;
  const int64_t words = ceil_div(s.k, S::kWidth);
  std::vector<uint8_t> out =
      begin_pack(format_of<kN, kM>(), s, s.nonzeros(), kPackHeaderBytes + S::runs(s.n, s.k) * S::kBytes);
  for (int64_t row = 0; row < ceil_div(s.n, kOutputs) * kOutputs; ++row)
    for (int64_t w = 0; w < words; ++w) {
      auto* word =
          reinterpret_cast<uint32_t*>(out.data() + kPackHeaderBytes + (row / kOutputs * words + w) * S::kBytes) +
          row % kOutputs;
      auto* value = reinterpret_cast<float*>(word + kOutputs);
      const Source inside{s.data, s.stride_n, s.stride_k, s.n, row < s.n ? s.k : 0};
      for (int64_t g = 0; g < S::kGroups; ++g) write_group<kN, kM>(inside, row, w * S::kWidth + g * kM, g, word, value);
    }
  return out;
}

template <int64_t kN, int64_t kM>
std::string view(const PackHeader& h, const uint8_t* bytes, int64_t size, Pack* out) {
  // The product of runs and bytes may pass 2^63 where N and K are damaged.
  const int64_t runs = Shape<kN, kM>::runs(h.n, h.k);
  const int64_t least = std::min(runs, size) * Shape<kN, kM>::kBytes;
  if (least > size) return "got " + std::to_string(size) + " bytes, expected at least " + std::to_string(least);
  const std::string error = size_error(h, size, kPackHeaderBytes + runs * Shape<kN, kM>::kBytes);
  if (!error.empty()) return error;
  *out = {};
  out->format = kNm;
  out->block = h.block;
  out->n = h.n;
  out->k = h.k;
  out->total = runs * kOutputs * Shape<kN, kM>::kValues;
  out->step = bytes + kPackHeaderBytes;
  return "";
}

template <int64_t kN, int64_t kM>
void unpack(const Pack& p, float* weight) {
  using S = Shape<kN, kM>;
  const int64_t words = ceil_div(p.k, S::kWidth);
  for (int64_t row = 0; row < p.n; ++row)
    for (int64_t w = 0; w < words; ++w) {
      const auto* word =
          reinterpret_cast<const uint32_t*>(p.step + (row / kOutputs * words + w) * S::kBytes) + row % kOutputs;
      const auto* value = reinterpret_cast<const float*>(word + kOutputs);
      for (int64_t i = 0; i < S::kValues; ++i) {
        const int64_t k = w * S::kWidth + i / kN * kM + (*word >> (S::kBits * i) & (kM - 1));
        if (k < p.k && value[i * kOutputs] != 0.0f) weight[row * p.k + k] = value[i * kOutputs];
      }
    }
}

template <int64_t kN, int64_t kM>
constexpr PackedFormat make(const char* name) {
  return {
      kNm, name, 256 * kN + kM, kLargestSide, &pack<kN, kM>, &view<kN, kM>, &differs_from_its_repack, &unpack<kN, kM>};
}

}  // namespace

const PackedFormat kNm14 = make<1, 4>("nm1:4");
const PackedFormat kNm24 = make<2, 4>("nm2:4");
const PackedFormat kNm48 = make<4, 8>("nm4:8");

}  // namespace fs::sparse_matmul::formats
