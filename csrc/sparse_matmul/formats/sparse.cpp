#include "sparse.h"

#include <cstring>
#include <numeric>

#include "bitmap16.h"
#include "bitmap32.h"
#include "blocks.h"
#include "blocks16.h"
#include "nm.h"
#include "nm24.h"
#include "pair.h"
#include "panels128.h"
#include "sell16.h"
#include "sell4.h"
#include "sell8.h"

namespace fs::sparse_matmul::formats {
namespace {

constexpr const PackedFormat* kFormats[] = {
    &kBitmap32Format, &kSell16Format, &kPanels128Format, &kSell8Format,  &kSell8x32Format, &kSell4Format,
    &kBlocks1x4,      &kBlocks4x4,    &kBlocks8x8,       &kBlocks16x16,  &kBlocks16x1,     &kNm14,
    &kNm24,           &kNm48,         &kSell8Bf16,       &kSell8x32Bf16, &kPanels128Bf16,  &kSell8x16Format,
};

template <class T>
std::string text(T value) {
  return std::to_string(value);
}

// A bitmap32 of bfloat16, which runs on the CPU, too.
bool is_bitmap_bf16(const PackHeader& h) {
  return std::memcmp(h.magic, "fspk", 4) == 0 && bitmap16::is_bitmap16(h) && h.dtype == kDTypeBf16;
}

Pack of_bf16(const bitmap16::Weight& w) {
  Pack p{};
  p.format = kBitmap32;
  p.n = w.n;
  p.k = w.k;
  p.total = w.total;
  p.offset = w.offset;
  p.mask = w.mask;
  p.bf16 = true;
  p.value16 = w.value;
  return p;
}

// Into zeros.
void unpack_bitmap_bf16(const Pack& p, float* weight) {
  const uint16_t* value = p.value16;
  for (int64_t b = 0; b < ceil_div(p.n, kBitmapColumns); ++b)
    for (int64_t k = 0; k < p.k; ++k)
      for (uint32_t m = p.mask[b * p.k + k]; m != 0; m &= m - 1) {
        const uint32_t bits = uint32_t{*value++} << 16;
        std::memcpy(weight + (b * kBitmapColumns + __builtin_ctz(m)) * p.k + k, &bits, 4);
      }
}

// Empty if the header is one of `format`, what the sizes are to be aside.
std::string header_error(const PackHeader& h, int64_t size, const PackedFormat** format) {
  if (std::memcmp(h.magic, "fspk", 4) != 0)
    return "got bytes that do not begin with \"fspk\"; make one with ops.pack()";
  if (h.format == nm24::kFormat) return "got nm24, which runs on CUDA only";
  if (h.format == kPair) return "got a pair, which runs on the CPU only";
  if (h.format == blocks16::kFormat) return "got blocks16, which runs on CUDA only";
  if (bitmap16::is_bitmap16(h)) return "got a bitmap32 of float16, which runs on CUDA only";
  const PackedFormat* f = *format = find(h.format, h.block, h.dtype);
  if (f == nullptr) f = *format = find(h.format);
  if (f == nullptr) return "got format " + text(h.format) + ", expected " + known();
  if (h.version != kVersion)
    return std::string("got ") + f->name + " version " + text(h.version) + ", this build reads version 1";
  if (h.dtype != f->dtype || h.block != f->block)
    return "got dtype code " + text(h.dtype) + " and block " + text(h.block) + ", expected 2 and " + text(f->block);
  const bool sides = h.n >= 0 && h.k >= 0 && h.n < kLargestSide && h.k < kLargestSide;
  if (!sides || h.k > f->largest_k) return "got a damaged header: N=" + text(h.n) + ", K=" + text(h.k);
  if (h.nonzeros < 0 || h.nonzeros > h.n * h.k || h.nonzeros > size)
    return "got a damaged header: " + text(h.nonzeros) + " non-zeros";
  if (!all_zero(h.zero, h.zero + sizeof h.zero)) return "got a damaged header: reserved bytes that are not zero";
  return "";
}

}  // namespace

const PackedFormat* find(int64_t code, int64_t block, uint32_t dtype) {
  for (const PackedFormat* format : kFormats)
    if (format->code == code && (block == 0 || format->block == block) && format->dtype == dtype) return format;
  return nullptr;
}

std::string known() {
  std::string all;
  for (const PackedFormat* format : kFormats) {
    if (format->dtype != kDTypeF32) continue;
    if (!all.empty()) all += format == &kNm48 ? " or " : ", ";
    all += text(format->code) + " (" + format->name + ")";
  }
  return all;
}

std::vector<uint8_t> pack(const PackedFormat& format, const float* weight, int64_t stride_n, int64_t stride_k,
                          int64_t n, int64_t k) {
  return format.pack({weight, stride_n, stride_k, n, k});
}

std::string view(const uint8_t* bytes, int64_t size, Pack* out, int64_t rows) {
  if (size < kPackHeaderBytes) return "got " + text(size) + " bytes, a header alone has 64";
  PackHeader h;
  std::memcpy(&h, bytes, sizeof h);
  if (h.format == kPair && std::memcmp(h.magic, "fspk", 4) == 0) return view_pair(h, bytes, size, rows, out);
  if (is_bitmap_bf16(h)) {
    bitmap16::Weight w;
    const std::string error = bitmap16::view(h, bytes, size, &w);
    if (error.empty()) *out = of_bf16(w);
    return error;
  }
  const PackedFormat* format;
  const std::string error = header_error(h, size, &format);
  return error.empty() ? format->view(h, bytes, size, out) : error;
}

PackHeader described(int64_t kind, int64_t n, int64_t k, int64_t size) {
  PackHeader header{};
  std::memcpy(header.magic, "fspk", 4);
  header.format = static_cast<uint16_t>(kind & 0xffff);
  header.version = kVersion;
  header.dtype = static_cast<uint32_t>(kind >> 16 & 0xffff);
  header.block = static_cast<uint32_t>(kind >> 32);
  header.n = n;
  header.k = k;
  if (header.format == kBitmap32 && n < kLargestSide && k < kLargestSide)
    header.nonzeros = std::min(bitmap_room(n, k, header.dtype == kDTypeF32 ? 4 : 2, size), n * k);
  header.bytes = static_cast<uint64_t>(size);
  return header;
}

std::string view_bitmap32(const PackHeader& header, const uint8_t* bytes, int64_t size, Pack* out) {
  const PackedFormat* format;
  const std::string error = header_error(header, size, &format);
  if (!error.empty()) return error;
  if (header.format != kBitmap32)
    return std::string("got ") + format->name + ", which runs on the CPU only; expected bitmap32, nm24 or blocks16";
  return format->view(header, bytes, size, out);
}

std::string validate(const uint8_t* bytes, int64_t size) {
  Pack p;
  const std::string error = view(bytes, size, &p);
  if (!error.empty()) return error;
  bitmap16::Weight w;
  if (p.format == kBitmap32 && p.bf16) return bitmap16::validate(bytes, size, &w);
  PackHeader h;
  std::memcpy(&h, bytes, sizeof h);
  return h.format == kPair ? pair_damage(h, bytes, size) : find(h.format, h.block, h.dtype)->damage(h, p, bytes);
}

void unpack(const Pack& p, float* weight) {
  if (p.n == 0 || p.k == 0) return;  // an empty tensor has no memory
  std::memset(weight, 0, static_cast<size_t>(p.n * p.k) * sizeof(float));
  if (p.format == kBitmap32 && p.bf16) return unpack_bitmap_bf16(p, weight);
  find(p.format, p.block, p.bf16 ? kDTypeBf16 : kDTypeF32)->unpack(p, weight);
}

// --- what the layouts share ------------------------------------------------------------------------------------------

std::vector<uint8_t> begin_pack(const PackedFormat& format, const Source& source, int64_t nonzeros, int64_t bytes) {
  PackHeader header{};
  std::memcpy(header.magic, "fspk", 4);
  header.format = static_cast<uint16_t>(format.code);
  header.version = kVersion;
  header.dtype = format.dtype;
  header.block = format.block;
  header.n = source.n;
  header.k = source.k;
  header.nonzeros = nonzeros;
  header.bytes = static_cast<uint64_t>(bytes);
  std::vector<uint8_t> out(static_cast<size_t>(bytes));
  std::memcpy(out.data(), &header, sizeof header);
  return out;
}

std::string size_error(const PackHeader& header, int64_t size, int64_t expected) {
  if (size == expected && header.bytes == static_cast<uint64_t>(expected)) return "";
  return "got " + text(size) + " bytes (the header says " + text(header.bytes) + "), expected " + text(expected);
}

std::vector<uint32_t> descending(const std::vector<int64_t>& count) {
  std::vector<uint32_t> order(count.size());
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return count[a] > count[b]; });
  return order;
}

std::string offsets_damage(const uint64_t* offset, int64_t groups, int64_t total) {
  if (offset[0] != 0 || offset[groups] != static_cast<uint64_t>(total))
    return damaged("offsets that do not span the values");
  for (int64_t g = 0; g < groups; ++g)
    if (offset[g] > offset[g + 1] || offset[g + 1] > static_cast<uint64_t>(total))
      return damaged("offsets that do not ascend");
  return "";
}

std::string differs_from_its_repack(const PackHeader& header, const Pack& p, const uint8_t* bytes) {
  const PackedFormat& format = *find(header.format, header.block);
  std::vector<float> weight(static_cast<size_t>(p.n * p.k));
  if (!weight.empty()) format.unpack(p, weight.data());
  const std::vector<uint8_t> again = format.pack({weight.data(), p.k, 1, p.n, p.k});
  if (std::equal(again.begin(), again.end(), bytes, bytes + header.bytes)) return "";
  return damaged("values and places that do not fit each other or the header");
}

std::string values_damage(const float* value, int64_t total, const uint8_t* end) {
  if (!std::all_of(value, value + total, [](float w) { return w != 0.0f; })) return damaged("a stored zero");
  return all_zero(reinterpret_cast<const uint8_t*>(value + total), end) ? "" : damaged(kGap);
}

}  // namespace fs::sparse_matmul::formats
