// int8_gemm, AMX-INT8 (and AVX-512 for what lies round a tile): exact, -128 included.
// Idea     tdpbusd multiplies 16 rows of 64 k by 64 k of 16 columns in one instruction. A column panel of vnni16 is a
//          tile as it lies in memory, and so is the A panel of the avx512 row, which has all else of this row.
// Tile     up to 32 rows x 32 columns: 2 x 2 tiles of sums, 2 of x, 2 of weights = 8 of 8. Up to 16 rows: 16 x 64.
//          Up to kVnniRows rows are left to the avx512 row: they are bound by reading the weights, not by arithmetic.
// Reads    x 16 rows of 64 bytes at kRowStride; weights 1024 bytes in a row. Tiles always have 16 rows: those beyond
//          `rows` hold whatever lies in the scratch, and their sums are not handed on.
// Start    a tile load with stride 0 puts -offset * column_sum into every row, so the compensation costs nothing.
// Tails    n: 16 columns at a time; k: the last steps of the weights are copied to a tile whose other rows are zero,
//          since behind them the next column panel begins.
// Bound    per 64 k of 32 x 32: 4 products of 16 cycles, 64 lines loaded = 32 cycles: compute.
// Prefetch the next column panel comes to L2 (prefetcht1) evenly under the current one.
// Measured docs/kernels/int8_gemm.md
#include <immintrin.h>

#include "../int8_gemm.h"

namespace {

using namespace fs::int8_gemm;

constexpr int kTileRows = 16;
constexpr int kTileK = 64;  // bytes of a row of x
constexpr int kTileSteps = kTileK / kStepK;
constexpr int kTileBytes = kTileSteps * kPanelColumns * kStepK;
constexpr int64_t kBlockTiles = kBlockBytes / kTileK;
constexpr int kVnniRows = 4;

// What ldtilecfg reads: all eight tiles have 16 rows of 64 bytes.
struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "as the instruction reads it");
constexpr TileConfig kTileConfig;

// Written out: gcc 12's _tile_loadconfig tells the compiler of 8 bytes only.
void enter() { asm volatile("ldtilecfg %0" ::"m"(kTileConfig)); }
void leave() { asm volatile("tilerelease" ::); }

// Before the products of a tile: what the sums start from, and the last, incomplete 64 k of each column panel.
struct Prepared {
  alignas(64) int32_t start[kMaxTileColumns];
  alignas(64) int8_t tail[kMaxTileColumns / kPanelColumns][kTileBytes];
  int64_t full;   // tiles of 64 k that the column panels hold whole
  int64_t tiles;  // and with the tail

  explicit Prepared(const TileArgs& t) {
    full = t.k_steps / kTileSteps;
    const int64_t rest = t.k_steps % kTileSteps;
    tiles = full + (rest > 0);
    const __m512i offset = _mm512_set1_epi32(-t.offset);
    for (int64_t n = 0; n < t.columns; n += kPanelColumns)
      _mm512_store_si512(start + n, _mm512_mullo_epi32(_mm512_loadu_si512(t.column_sum + n), offset));
    if (rest == 0) return;
    for (int64_t p = 0; p < t.columns / kPanelColumns; ++p) {
      const int8_t* last = t.weight + p * t.panel_stride + full * kTileBytes;
      for (int64_t i = 0; i < kTileSteps; ++i)
        _mm512_store_si512(tail[p] + 64 * i, i < rest ? _mm512_loadu_si512(last + 64 * i) : _mm512_setzero_si512());
    }
  }
};

// Tiles 0 to 3 are sums, two row halves of kPanels (or one of up to four); 4 and 5 x; 6 and 7 weights.
template <int kHalves, int kPanels>
void multiply(const TileArgs& t) {
  static_assert(kHalves * kPanels <= 4, "tiles of sums");
  constexpr int64_t acc_stride = kMaxTileColumns * sizeof(int32_t);
  const Prepared prepared(t);
  const auto weights = [&](int64_t panel, int64_t i) {
    return i < prepared.full ? t.weight + panel * t.panel_stride + i * kTileBytes : prepared.tail[panel];
  };
  const char* next = reinterpret_cast<const char*>(t.prefetch_next);
  const int64_t lines =  // of the next column panel, under each 64 k
      next == nullptr || prepared.tiles == 0 ? 0 : (t.prefetch_bytes + 64 * prepared.tiles - 1) / (64 * prepared.tiles);

  _tile_loadd(0, prepared.start, 0);
  if constexpr (kPanels > 1) _tile_loadd(1, prepared.start + 16, 0);
  if constexpr (kPanels > 2) _tile_loadd(2, prepared.start + 32, 0);
  if constexpr (kPanels > 2) _tile_loadd(3, prepared.start + 48, 0);
  if constexpr (kHalves > 1) _tile_loadd(2, prepared.start, 0);
  if constexpr (kHalves > 1 && kPanels > 1) _tile_loadd(3, prepared.start + 16, 0);
  const uint8_t* block = t.panel;
  int64_t in_block = 0;
  for (int64_t i = 0; i < prepared.tiles; ++i, ++in_block) {
    if (in_block == kBlockTiles) {
      in_block = 0;
      block += t.block_stride;
    }
    const uint8_t* x = block + in_block * kTileK;
    _tile_loadd(4, x, kRowStride);
    _tile_loadd(6, weights(0, i), 64);
    _tile_dpbusd(0, 4, 6);
    if constexpr (kPanels > 1) {
      _tile_loadd(7, weights(1, i), 64);
      _tile_dpbusd(1, 4, 7);
    }
    if constexpr (kPanels > 2) {
      _tile_loadd(6, weights(2, i), 64);
      _tile_dpbusd(2, 4, 6);
      _tile_loadd(7, weights(3, i), 64);
      _tile_dpbusd(3, 4, 7);
    }
    if constexpr (kHalves > 1) {
      _tile_loadd(5, x + kTileRows * kRowStride, kRowStride);
      _tile_dpbusd(2, 5, 6);
      if constexpr (kPanels > 1) _tile_dpbusd(3, 5, 7);
    }
    for (int64_t line = 0; line < lines; ++line, next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
  int32_t* below = t.acc + kTileRows * kMaxTileColumns;
  _tile_stored(0, t.acc, acc_stride);
  if constexpr (kPanels > 1) _tile_stored(1, t.acc + 16, acc_stride);
  if constexpr (kPanels > 2) _tile_stored(2, t.acc + 32, acc_stride);
  if constexpr (kPanels > 2) _tile_stored(3, t.acc + 48, acc_stride);
  if constexpr (kHalves > 1) _tile_stored(2, below, acc_stride);
  if constexpr (kHalves > 1 && kPanels > 1) _tile_stored(3, below + 16, acc_stride);
}

void tile(const TileArgs& t) {
  if (t.rows <= kVnniRows) return kAvx512.tile(t);
  const bool one_half = t.rows <= kTileRows;
  const int width = one_half ? 4 : 2;
  TileArgs part = t;
  for (int64_t panel = 0, panels = t.columns / kPanelColumns; panel < panels;) {
    const int64_t left = panels - panel < width ? panels - panel : width;
    part.weight = t.weight + panel * t.panel_stride;
    part.column_sum = t.column_sum + panel * kPanelColumns;
    part.acc = t.acc + panel * kPanelColumns;
    part.columns = left * kPanelColumns;
    if (one_half && left == 4) {
      multiply<1, 4>(part);
      panel += 4;
    } else if (left >= 2) {
      part.columns = 2 * kPanelColumns;
      if (one_half)
        multiply<1, 2>(part);
      else
        multiply<2, 2>(part);
      panel += 2;
    } else {
      if (one_half)
        multiply<1, 1>(part);
      else
        multiply<2, 1>(part);
      panel += 1;
    }
    part.prefetch_next = nullptr;  // once
  }
}

// The panels are the avx512 row's, and all that is not a tile.
void quantize(const QuantizeArgs& a) { kAvx512.quantize(a); }
void widen(const WidenArgs& a) { kAvx512.widen(a); }
void epilogue(const EpilogueArgs& a) { kAvx512.epilogue(a); }

}  // namespace

const Kernels fs::int8_gemm::kAmx = {
    "amx",           fs::isa::Level::amx, fs::isa::kLevelAmx, 1,      128,   2 * kTileRows, kTileRows, kTileRows,
    kMaxTileColumns, 2 * kPanelColumns,   &quantize,          &widen, &tile, &epilogue,     &enter,    &leave};
