// int8_mm, levels with 256-bit registers: B as it comes into the cells of vnni16, with the sums of its columns.
// Idea     [K,N]: four rows of 32 columns (64 with AVX-512, whole lines) interleaved by byte and word unpacks, which
//          work in parts of a register, and a part is 16 columns, a panel. [N,K]: 8 x 8 transposes of words of 4 k.
//          12 shuffles per 128 bytes (16 per 256), 24 per 256.
// Reads    [K,N]: 64 rows at a time across all columns, so that pages and lines are used up before they are left; the
//          rows behind are prefetched. [N,K]: 16 rows side by side.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "../int8_gemm.h"

namespace {

using fs::int8_gemm::kPanelColumns;
using fs::int8_gemm::kStepK;
using fs::int8_gemm::PackArgs;

constexpr int64_t kCellBytes = kPanelColumns * kStepK;
constexpr int64_t kPackRowsAhead = 64;

inline __m256i load_bytes(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// 8 columns x 4 k stored; sums of 4 k added to those of their columns. 1 * s8 pairs can't saturate.
inline void store_half_cell(int8_t* cell, __m256i words, __m256i& sums) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(cell), words);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), words);
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// The sums of a panel's columns in registers.
struct PanelSums {
  int32_t* memory;
  __m256i low, high;
  explicit PanelSums(int32_t* at) : memory(at) {
    low = _mm256_loadu_si256(reinterpret_cast<__m256i*>(at));
    high = _mm256_loadu_si256(reinterpret_cast<__m256i*>(at + 8));
  }
  void store() const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(memory), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(memory + 8), high);
  }
};

// kPanels (1 or 2) panels, `steps` times 4 rows; b at their first row and column.
template <int kPanels>
inline void interleave(const int8_t* b, int64_t stride, int64_t steps, int8_t* cell, int64_t panel_stride,
                       int32_t* column_sum) {
  PanelSums first(column_sum), second(column_sum + (kPanels - 1) * kPanelColumns);
  const auto row = [&](int64_t i) {
    const int8_t* p = b + i * stride;
    __builtin_prefetch(p + kPackRowsAhead * stride);
    return kPanels == 2 ? load_bytes(p) : _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  };
  for (int64_t s = 0; s < steps; ++s, b += kStepK * stride, cell += kCellBytes) {
    const __m256i r0 = row(0), r1 = row(1), r2 = row(2), r3 = row(3);
    const __m256i low01 = _mm256_unpacklo_epi8(r0, r1), high01 = _mm256_unpackhi_epi8(r0, r1);
    const __m256i low23 = _mm256_unpacklo_epi8(r2, r3), high23 = _mm256_unpackhi_epi8(r2, r3);
    const __m256i columns0 = _mm256_unpacklo_epi16(low01, low23), columns4 = _mm256_unpackhi_epi16(low01, low23);
    const __m256i columns8 = _mm256_unpacklo_epi16(high01, high23), columns12 = _mm256_unpackhi_epi16(high01, high23);
    store_half_cell(cell, _mm256_permute2x128_si256(columns0, columns4, 0x20), first.low);
    store_half_cell(cell + 32, _mm256_permute2x128_si256(columns8, columns12, 0x20), first.high);
    if constexpr (kPanels == 2) {
      store_half_cell(cell + panel_stride, _mm256_permute2x128_si256(columns0, columns4, 0x31), second.low);
      store_half_cell(cell + panel_stride + 32, _mm256_permute2x128_si256(columns8, columns12, 0x31), second.high);
    }
  }
  first.store();
  if constexpr (kPanels == 2) second.store();
}

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
// 64 columns, `steps` times 4 rows: four panels.
inline void interleave_wide(const int8_t* b, int64_t stride, int64_t steps, int8_t* cell, int64_t panel_stride,
                            int32_t* column_sum) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sums0 = _mm512_loadu_si512(column_sum), sums1 = _mm512_loadu_si512(column_sum + 16);
  __m512i sums2 = _mm512_loadu_si512(column_sum + 32), sums3 = _mm512_loadu_si512(column_sum + 48);
  const auto row = [&](int64_t i) {
    __builtin_prefetch(b + (i + kPackRowsAhead) * stride);
    return _mm512_loadu_si512(b + i * stride);
  };
  for (int64_t s = 0; s < steps; ++s, b += kStepK * stride, cell += kCellBytes) {
    const __m512i r0 = row(0), r1 = row(1), r2 = row(2), r3 = row(3);
    const __m512i low01 = _mm512_unpacklo_epi8(r0, r1), high01 = _mm512_unpackhi_epi8(r0, r1);
    const __m512i low23 = _mm512_unpacklo_epi8(r2, r3), high23 = _mm512_unpackhi_epi8(r2, r3);
    // Lane i: four columns of panel i. So the lanes are to be transposed.
    const __m512i columns0 = _mm512_unpacklo_epi16(low01, low23), columns4 = _mm512_unpackhi_epi16(low01, low23);
    const __m512i columns8 = _mm512_unpacklo_epi16(high01, high23), columns12 = _mm512_unpackhi_epi16(high01, high23);
    const __m512i left01 = _mm512_shuffle_i32x4(columns0, columns4, 0x44);
    const __m512i left23 = _mm512_shuffle_i32x4(columns0, columns4, 0xee);
    const __m512i right01 = _mm512_shuffle_i32x4(columns8, columns12, 0x44);
    const __m512i right23 = _mm512_shuffle_i32x4(columns8, columns12, 0xee);
    const auto put = [&](int64_t panel, __m512i words, __m512i& sums) {
      _mm512_storeu_si512(cell + panel * panel_stride, words);
      sums = _mm512_dpbusd_epi32(sums, ones, words);
    };
    put(0, _mm512_shuffle_i32x4(left01, right01, 0x88), sums0);
    put(1, _mm512_shuffle_i32x4(left01, right01, 0xdd), sums1);
    put(2, _mm512_shuffle_i32x4(left23, right23, 0x88), sums2);
    put(3, _mm512_shuffle_i32x4(left23, right23, 0xdd), sums3);
  }
  _mm512_storeu_si512(column_sum, sums0);
  _mm512_storeu_si512(column_sum + 16, sums1);
  _mm512_storeu_si512(column_sum + 32, sums2);
  _mm512_storeu_si512(column_sum + 48, sums3);
}
#endif

// 8 columns x 8 steps; b at the first column, k side by side. `cell` is the half of the first step's cell.
inline void transpose_words(const int8_t* b, int64_t stride, int8_t* cell, __m256i& sums) {
  const auto row = [&](int64_t i) { return load_bytes(b + i * stride); };
  const auto low = [](__m256i a, __m256i b) { return _mm256_unpacklo_epi64(a, b); };
  const auto high = [](__m256i a, __m256i b) { return _mm256_unpackhi_epi64(a, b); };
  const __m256i a01 = _mm256_unpacklo_epi32(row(0), row(1)), b01 = _mm256_unpackhi_epi32(row(0), row(1));
  const __m256i a23 = _mm256_unpacklo_epi32(row(2), row(3)), b23 = _mm256_unpackhi_epi32(row(2), row(3));
  const __m256i a45 = _mm256_unpacklo_epi32(row(4), row(5)), b45 = _mm256_unpackhi_epi32(row(4), row(5));
  const __m256i a67 = _mm256_unpacklo_epi32(row(6), row(7)), b67 = _mm256_unpackhi_epi32(row(6), row(7));
  const auto put = [&](int64_t step, __m256i top, __m256i bottom) {
    store_half_cell(cell + step * kCellBytes, _mm256_permute2x128_si256(top, bottom, 0x20), sums);
    store_half_cell(cell + (step + 4) * kCellBytes, _mm256_permute2x128_si256(top, bottom, 0x31), sums);
  };
  put(0, low(a01, a23), low(a45, a67));
  put(1, high(a01, a23), high(a45, a67));
  put(2, low(b01, b23), low(b45, b67));
  put(3, high(b01, b23), high(b45, b67));
}

// One step of 8 columns, for what is left of 8 steps.
inline void gather_words(const int8_t* b, int64_t stride, int8_t* half_cell, __m256i& sums) {
  int32_t words[8];
  for (int i = 0; i < 8; ++i) __builtin_memcpy(words + i, b + i * stride, 4);
  store_half_cell(half_cell, load_bytes(reinterpret_cast<const int8_t*>(words)), sums);
}

void pack(const PackArgs& a) {
  const int64_t steps = a.k / kStepK, panel_stride = a.panel_stride;
  if (a.stride_n == 1) {
    constexpr int64_t kBlockRows = 64;
    for (int64_t k = 0; k < a.k; k += kBlockRows) {
      const int64_t block_steps = (a.k - k < kBlockRows ? a.k - k : kBlockRows) / kStepK;
      const int8_t* b = a.b + k * a.stride_k;
      int8_t* cell = a.cells + k / kStepK * kCellBytes;
      int64_t n = 0;
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
      for (; n + 4 * kPanelColumns <= a.columns; n += 4 * kPanelColumns, cell += 4 * panel_stride)
        interleave_wide(b + n, a.stride_k, block_steps, cell, panel_stride, a.column_sum + n);
#endif
      for (; n + 2 * kPanelColumns <= a.columns; n += 2 * kPanelColumns, cell += 2 * panel_stride)
        interleave<2>(b + n, a.stride_k, block_steps, cell, panel_stride, a.column_sum + n);
      if (n < a.columns) interleave<1>(b + n, a.stride_k, block_steps, cell, panel_stride, a.column_sum + n);
    }
    return;
  }
  for (int64_t n = 0; n < a.columns; n += kPanelColumns) {
    const int8_t *low = a.b + n * a.stride_n, *high = low + 8 * a.stride_n;
    int8_t* cell = a.cells + n / kPanelColumns * panel_stride;
    PanelSums sums(a.column_sum + n);
    int64_t s = 0;
    for (; s + 8 <= steps; s += 8, low += 32, high += 32, cell += 8 * kCellBytes) {
      transpose_words(low, a.stride_n, cell, sums.low);
      transpose_words(high, a.stride_n, cell + 32, sums.high);
    }
    for (; s < steps; ++s, low += kStepK, high += kStepK, cell += kCellBytes) {
      gather_words(low, a.stride_n, cell, sums.low);
      gather_words(high, a.stride_n, cell + 32, sums.high);
    }
    sums.store();
  }
}

}  // namespace
