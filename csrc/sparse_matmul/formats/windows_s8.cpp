#include "windows_s8.h"

#include <algorithm>

#include "header_s8.h"

namespace fs::sparse_matmul::windows_s8 {
namespace {

using int8::kSlots;
using int8::kStepBytes;
using int8::kTileK;
using int8::kWindow;
using int8::kWindowOutputs;
using int8::Windows;

constexpr int64_t kPlaces = kWindowOutputs * kSlots;  // of a step

// Where the sections begin.
struct Layout {
  int64_t offset, base, step, sum, bytes;
  Layout(int64_t n, int64_t total) {
    const int64_t slices = (n + kWindowOutputs - 1) / kWindowOutputs;
    offset = kPackHeaderBytes;
    base = offset + round_to_64(8 * (slices + 1));
    step = base + round_to_64(2 * total);
    sum = step + kStepBytes * total;
    bytes = sum + 4 * kWindowOutputs * slices;
  }
};

// The weights of an output that are not zero.
struct Row {
  std::vector<int32_t> k;
  std::vector<int8_t> value;
  size_t next = 0;
  bool done() const { return next == k.size(); }
};

// What is stored of the outputs of a slice.
struct Slice {
  std::vector<uint16_t> base;
  std::vector<uint8_t> step;
  int32_t sum[kWindowOutputs] = {};
  int64_t nonzeros = 0;
};

// Of the first `outputs` rows at weight.
Slice pack_slice(const int8_t* weight, int64_t stride_n, int64_t stride_k, int64_t outputs, int64_t k) {
  Slice s;
  Row rows[kWindowOutputs];
  for (int64_t j = 0; j < outputs; ++j) {
    for (int64_t i = 0; i < k; ++i) {
      const int8_t w = weight[j * stride_n + i * stride_k];
      if (w == 0) continue;
      rows[j].k.push_back(static_cast<int32_t>(i));
      rows[j].value.push_back(w);
      s.sum[j] += w;
    }
    s.nonzeros += static_cast<int64_t>(rows[j].k.size());
  }
  for (;;) {
    int64_t start = k;
    for (const Row& row : rows)
      if (!row.done()) start = std::min<int64_t>(start, row.k[row.next]);
    if (start == k) return s;
    start -= start % kTileK;
    s.base.push_back(static_cast<uint16_t>(start / kTileK));
    s.step.resize(s.step.size() + kStepBytes);
    uint8_t* place = s.step.data() + s.step.size() - kStepBytes;
    for (Row& row : rows)
      for (int64_t i = 0; i < kSlots; ++i, ++place) {
        if (row.done() || row.k[row.next] >= start + kWindow) continue;
        place[0] = static_cast<uint8_t>(row.k[row.next] - start);
        place[kPlaces] = static_cast<uint8_t>(row.value[row.next]);
        ++row.next;
      }
  }
}

// The first `outputs` rows of a slice into weight[outputs][k], zeros where nothing is stored.
void unpack_slice(const Windows& p, int64_t slice, int64_t outputs, int8_t* weight) {
  if (p.k > 0) std::memset(weight, 0, static_cast<size_t>(outputs * p.k));
  for (int64_t step = p.begin(slice); step < p.end(slice); ++step) {
    const uint8_t* place = p.step + step * kStepBytes;
    for (int64_t i = 0; i < kPlaces; ++i) {
      const auto w = static_cast<int8_t>(place[kPlaces + i]);
      const int64_t row = i / kSlots, k = p.base[step] * kTileK + place[i];
      if (w != 0 && row < outputs && k < p.k) weight[row * p.k + k] = w;
    }
  }
}

int64_t outputs_of(int64_t n, int64_t slice) { return std::min(kWindowOutputs, n - slice * kWindowOutputs); }

template <class T>
void append(std::vector<T>& to, const std::vector<T>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

}  // namespace

std::vector<uint8_t> pack(const int8_t* weight, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k) {
  std::vector<uint64_t> offset{0};
  std::vector<uint16_t> base;
  std::vector<uint8_t> step;
  std::vector<int32_t> sum;
  int64_t nonzeros = 0;
  for (int64_t slice = 0; slice * kWindowOutputs < n; ++slice) {
    const Slice s = pack_slice(weight + slice * kWindowOutputs * stride_n, stride_n, stride_k, outputs_of(n, slice), k);
    append(base, s.base);
    append(step, s.step);
    sum.insert(sum.end(), s.sum, s.sum + kWindowOutputs);
    nonzeros += s.nonzeros;
    offset.push_back(base.size());
  }
  const Layout at(n, static_cast<int64_t>(base.size()));
  std::vector<uint8_t> out(static_cast<size_t>(at.bytes));
  const PackHeader header = s8_header(kFormat, kBlock, n, k, nonzeros, out.size());
  std::memcpy(out.data(), &header, sizeof header);
  const auto put = [&](int64_t place, const void* from, size_t bytes) {
    if (bytes > 0) std::memcpy(out.data() + place, from, bytes);
  };
  put(at.offset, offset.data(), offset.size() * 8);
  put(at.base, base.data(), base.size() * 2);
  put(at.step, step.data(), step.size());
  put(at.sum, sum.data(), sum.size() * 4);
  return out;
}

std::string view(const PackHeader& h, const uint8_t* bytes, int64_t size, Windows* out) {
  if (h.block != kBlock) return "got block " + std::to_string(h.block) + ", expected 32 for windows_s8";
  std::string error = s8_header_error(h);
  if (!error.empty()) return error;
  const int64_t slices = (h.n + kWindowOutputs - 1) / kWindowOutputs;
  const int64_t least = Layout(h.n, 0).bytes;
  if (size < least) return s8_size_error(h, size, least);
  const auto* offset = reinterpret_cast<const uint64_t*>(bytes + kPackHeaderBytes);
  uint64_t total;
  std::memcpy(&total, offset + slices, sizeof total);
  if (total > static_cast<uint64_t>(size) / kStepBytes)
    return "got a damaged pack: " + std::to_string(total) + " steps in " + std::to_string(size) + " bytes";
  const auto steps = static_cast<int64_t>(total);
  const Layout at(h.n, steps);
  error = s8_size_error(h, size, at.bytes);
  if (error.empty())
    *out = {h.n,
            h.k,
            steps,
            offset,
            reinterpret_cast<const uint16_t*>(bytes + at.base),
            bytes + at.step,
            reinterpret_cast<const int32_t*>(bytes + at.sum)};
  return error;
}

std::string validate(const PackHeader& h, const uint8_t* bytes, int64_t size, Windows* out) {
  const std::string error = view(h, bytes, size, out);
  if (!error.empty()) return error;
  const std::string damaged =
      "got a damaged pack: offsets, windows, indices, values and sums that do not fit each other or the header";
  // There is one way to pack a slice, so packing again shows every byte that is not as it should be. Slice by slice: a
  // few bytes may stand for a large weight of zeros.
  const Layout at(h.n, out->total);
  const auto zeros = [&](int64_t begin, int64_t end) {
    return std::all_of(bytes + begin, bytes + end, [](uint8_t byte) { return byte == 0; });
  };
  if (!zeros(at.offset + 8 * (out->slices() + 1), at.base) || !zeros(at.base + 2 * out->total, at.step)) return damaged;
  std::vector<int8_t> weight(static_cast<size_t>(kWindowOutputs * h.k));
  int64_t nonzeros = 0;
  uint64_t total = 0;
  for (int64_t slice = 0; slice < out->slices(); ++slice) {
    if (out->offset[slice] != total) return damaged;
    const int64_t outputs = outputs_of(h.n, slice), begin = out->begin(slice);
    unpack_slice(*out, slice, outputs, weight.data());
    const Slice again = pack_slice(weight.data(), h.k, 1, outputs, h.k);
    const size_t steps = again.base.size();
    if (out->offset[slice + 1] != total + steps ||
        std::memcmp(again.sum, out->sum + slice * kWindowOutputs, sizeof again.sum) != 0 ||
        !std::equal(again.base.begin(), again.base.end(), out->base + begin) ||
        !std::equal(again.step.begin(), again.step.end(), out->step + begin * kStepBytes))
      return damaged;
    total += steps;
    nonzeros += again.nonzeros;
  }
  return nonzeros == h.nonzeros ? "" : damaged;
}

void unpack(const Windows& p, int8_t* weight) {
  for (int64_t slice = 0; slice < p.slices(); ++slice)
    unpack_slice(p, slice, outputs_of(p.n, slice), weight + slice * kWindowOutputs * p.k);
}

}  // namespace fs::sparse_matmul::windows_s8
