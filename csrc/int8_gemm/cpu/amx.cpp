// int8_gemm, AMX-INT8 (and AVX-512 for what lies round a tile): exact, -128 included.
// Idea     tdpbusd multiplies 16 rows of 64 k by 64 k of 16 columns in one instruction. A column panel of vnni16 is a
//          tile as it lies in memory, and so is the A panel of the avx512 row, which has all else of this row.
// Tile     up to 32 rows x 32 columns: 2 x 2 tiles of sums, 2 of x, 2 of weights = 8 of 8. Up to 16 rows: 16 x 64.
//          Up to kVnniRows rows (one, where the weights lie in L2) are left to the avx512 row: they are bound by
//          reading the weights, not by arithmetic, and its loop reads faster.
// Reads    x 16 rows of 64 bytes at kRowStride; weights 1024 bytes in a row. Tiles always have 16 rows: those beyond
//          `rows` hold whatever lies in the scratch, and their sums are not handed on.
// Start    a tile load with stride 0 puts -offset * column_sum into every row, so the compensation costs nothing.
// Tails    n: 16 columns at a time; k: the last steps of the weights are copied to a tile whose other rows are zero,
//          since behind them the next column panel begins.
// Bound    per 64 k of 32 x 32: 4 products of 16 cycles, 64 lines loaded = 32 cycles: compute.
// Prefetch weights beyond L2: one tile of rows reads each weight once and asks for the next 64 k (prefetcht0); under
//          several the next column panel comes to L2 evenly (prefetcht1).
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

// ldtilecfg written out: gcc 12's _tile_loadconfig tells the compiler of 8 bytes only. What sums start from is written
// here, since a tile load that meets a store on its way waits until that store, and y's before it, are done.
void enter(const int32_t* column_sum, int64_t n, int32_t offset, int32_t* start) {
  asm volatile("ldtilecfg %0" ::"m"(kTileConfig));
  const __m512i factor = _mm512_set1_epi32(-offset);
  for (int64_t i = 0; i < n; i += kPanelColumns)
    _mm512_storeu_si512(start + i, _mm512_mullo_epi32(_mm512_loadu_si512(column_sum + i), factor));
}

void leave() { asm volatile("tilerelease" ::); }

// The last, incomplete 64 k of kPanels column panels, with zeros behind.
template <int kPanels>
struct Tail {
  alignas(64) int8_t tile[kPanels][kTileBytes];

  void copy(const int8_t* last, int64_t panel_stride, int64_t steps) {
    for (int p = 0; p < kPanels; ++p, last += panel_stride)
      for (int64_t i = 0; i < kTileSteps; ++i)
        _mm512_store_si512(tile[p] + 64 * i, i < steps ? _mm512_loadu_si512(last + 64 * i) : _mm512_setzero_si512());
  }
};

// The column panels [first, first + kPanels) of a call. Tiles 0 to 3 are sums: two halves of the rows times kPanels, or
// one half; 4 and 5 are x, 6 and 7 weights.
template <int kHalves, int kPanels>
void multiply(const TileArgs& t, int64_t first) {
  static_assert(kHalves * kPanels <= 4, "tiles of sums");
  constexpr bool kAhead = kHalves == 1 && kPanels == 4;  // one tile of rows: each weight is read once
  constexpr int64_t acc_stride = kMaxTileColumns * sizeof(int32_t);
  const int8_t* weight = t.weight + first * t.panel_stride;
  const int64_t full = t.k_steps / kTileSteps, rest = t.k_steps % kTileSteps, tiles = full + (rest > 0);
  Tail<kPanels> tail;
  if (rest > 0) tail.copy(weight + full * kTileBytes, t.panel_stride, rest);
  const auto weights = [&](int64_t panel, int64_t i) {
    return i < full ? weight + panel * t.panel_stride + i * kTileBytes : tail.tile[panel];
  };
  const char* next = reinterpret_cast<const char*>(t.prefetch_next);
  const int64_t lines =  // of the next column panel, under each 64 k
      next == nullptr || first > 0 || tiles == 0 ? 0 : (t.prefetch_bytes + 64 * tiles - 1) / (64 * tiles);

  const int32_t* start = t.start + first * kPanelColumns;
  int32_t* acc = t.acc + first * kPanelColumns;
  _tile_loadd(0, start, 0);
  if constexpr (kPanels > 1) _tile_loadd(1, start + 16, 0);
  if constexpr (kPanels > 2) _tile_loadd(2, start + 32, 0);
  if constexpr (kPanels > 2) _tile_loadd(3, start + 48, 0);
  if constexpr (kHalves > 1) _tile_loadd(2, start, 0);
  if constexpr (kHalves > 1 && kPanels > 1) _tile_loadd(3, start + 16, 0);
  const auto prefetch = [&](int64_t panel, int64_t i) {  // the weights of the next 64 k, come to L1
    if (!kAhead || t.in_l2) return;
    const char* p = reinterpret_cast<const char*>(weight + panel * t.panel_stride + (i + 1) * kTileBytes);
    for (int line = 0; line < kTileBytes; line += 64) _mm_prefetch(p + line, _MM_HINT_T0);
  };
  const uint8_t* block = t.panel;
  int64_t in_block = 0;
  for (int64_t i = 0; i < tiles; ++i, ++in_block) {
    if (in_block == kBlockTiles) {
      in_block = 0;
      block += t.block_stride;
    }
    const uint8_t* x = block + in_block * kTileK;
    _tile_loadd(4, x, kRowStride);
    _tile_loadd(6, weights(0, i), 64);
    _tile_dpbusd(0, 4, 6);
    prefetch(0, i);
    if constexpr (kPanels > 1) {
      _tile_loadd(7, weights(1, i), 64);
      _tile_dpbusd(1, 4, 7);
      prefetch(1, i);
    }
    if constexpr (kPanels > 2) {
      _tile_loadd(6, weights(2, i), 64);
      _tile_dpbusd(2, 4, 6);
      prefetch(2, i);
      _tile_loadd(7, weights(3, i), 64);
      _tile_dpbusd(3, 4, 7);
      prefetch(3, i);
    }
    if constexpr (kHalves > 1) {
      _tile_loadd(5, x + kTileRows * kRowStride, kRowStride);
      _tile_dpbusd(2, 5, 6);
      if constexpr (kPanels > 1) _tile_dpbusd(3, 5, 7);
    }
    if constexpr (!kAhead)
      for (int64_t line = 0; line < lines; ++line, next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
  int32_t* below = acc + kTileRows * kMaxTileColumns;
  _tile_stored(0, acc, acc_stride);
  if constexpr (kPanels > 1) _tile_stored(1, acc + 16, acc_stride);
  if constexpr (kPanels > 2) _tile_stored(2, acc + 32, acc_stride);
  if constexpr (kPanels > 2) _tile_stored(3, acc + 48, acc_stride);
  if constexpr (kHalves > 1) _tile_stored(2, below, acc_stride);
  if constexpr (kHalves > 1 && kPanels > 1) _tile_stored(3, below + 16, acc_stride);
}

template <int kHalves>
void tile_of(const TileArgs& t) {
  const int64_t panels = t.columns / kPanelColumns;
  int64_t p = 0;
  if constexpr (kHalves == 1)
    for (; p + 4 <= panels; p += 4) multiply<1, 4>(t, p);
  for (; p + 2 <= panels; p += 2) multiply<kHalves, 2>(t, p);
  if (p < panels) multiply<kHalves, 1>(t, p);
}

void tile(const TileArgs& t) {
  if (t.rows <= (t.in_l2 ? 1 : kVnniRows)) return kAvx512.tile(t);
  if (t.rows <= kTileRows) return tile_of<1>(t);
  tile_of<2>(t);
}

// The panels are the avx512 row's, and all that is not a tile.
void quantize(const QuantizeArgs& a) { kAvx512.quantize(a); }
void widen(const WidenArgs& a) { kAvx512.widen(a); }
void epilogue(const EpilogueArgs& a) { kAvx512.epilogue(a); }
void pack(const PackArgs& a) { kAvx512.pack(a); }

// Few rows: AMX has nothing to offer them.
void quantize_groups(const GroupQuantizeArgs& a) { kAvx512.weight_only->quantize(a); }
void tile_u4(const GroupTileArgs& t) { kAvx512.weight_only->tile_u4(t); }
void tile_s8(const GroupTileArgs& t) { kAvx512.weight_only->tile_s8(t); }
void finish(const FinishArgs& f) { kAvx512.weight_only->finish(f); }
constexpr WeightOnlyKernels weight_only = {12, &quantize_groups, &tile_u4, &tile_s8, &finish};

}  // namespace

const Kernels fs::int8_gemm::kAmx = {"amx",
                                     fs::isa::Level::amx,
                                     fs::isa::kLevelAmx,
                                     1,
                                     128,
                                     2 * kTileRows,
                                     kTileRows,
                                     kTileRows,
                                     kMaxTileColumns,
                                     2 * kPanelColumns,
                                     &quantize,
                                     &widen,
                                     &tile,
                                     &epilogue,
                                     &pack,
                                     &enter,
                                     &leave,
                                     nullptr,
                                     &weight_only,
                                     nullptr};
