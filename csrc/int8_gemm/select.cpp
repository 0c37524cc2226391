#include "select.h"

#include <algorithm>

#include "../runtime/table.h"

#if defined(FASTSPARSE_WITH_CUDA)
#include "cuda/sm80.h"
#endif

namespace fs::int8_gemm {
namespace {

constexpr const Kernels* kRows[] = {
#if defined(__x86_64__)
    &kAmx,      // Sapphire Rapids and later Xeons
    &kAvx512,   // Cascade Lake, Ice Lake, Sapphire Rapids, Zen 4
    &kAvxVnni,  // Alder Lake and later client cores
    &kAvx2,     // Haswell to Comet Lake, Zen 1 to 3
#endif
    &kScalar,
};

Table<Kernels> kernels(kRows);

void wrong_tile(const TileArgs& t) {
  kernels.spoiled().tile(t);
  t.acc[0] += 1;
}

}  // namespace

const Kernels& select() { return kernels.select(); }

std::vector<const Kernels*> table() { return kernels.all(); }

void spoil(const std::string& name) {
  kernels.spoil("int8_gemm", name, [](Kernels& copy) { copy.tile = &wrong_tile; });
}

std::vector<KernelInfo> kernel_infos() {
  std::vector<KernelInfo> infos = kernels.infos([](const Kernels& row) {
    return std::to_string(row.max_rows) + "x" + std::to_string(row.many_columns) + ", " + std::to_string(row.few_rows) +
           "x" + std::to_string(row.few_columns);
  });
#if defined(FASTSPARSE_WITH_CUDA)
  infos.push_back({"", sm80::kName, "cuda", "8x32, 16x32, 32x128, 128x128", true, true, sm80::kProven});
#endif
  return infos;
}

int64_t chunk_rows(const Kernels& kernels, int64_t m, int64_t k) {
  const int64_t row_bytes = (k * kernels.panel_bytes + kBlockBytes - 1) / kBlockBytes * kRowStride;
  // A quarter of L2; half where tiles are so fast that reading the weights again would be felt (a row step: AMX), and
  // where a chunk shares widened weights and its rows are twice as large (AVX2: 4096 x 4096, M = 128: 130 -> 139
  // GOP/s). Five eighths of AMD's small L2: each chunk reads the weights from L3, and with 4096 of k that is felt
  // before the panel's own misses are (Zen 4, 4096 x 4096, M = 128: chunks of 43 rows 12.7 ms, of 128 11.0).
  const bool tall = kernels.row_step > 1 || kernels.widen_weights != nullptr;
  const int64_t eighths = tall ? 4 : isa::amd() ? 5 : 2;
  const int64_t fit = isa::l2_bytes() * eighths / 8 / std::max<int64_t>(row_bytes, 1);
  int64_t tallest = std::clamp<int64_t>(fit, kernels.max_rows, 128);
  if (kernels.row_step > 1) tallest -= tallest % kernels.max_rows;
  // Even chunks: 130 rows are 65 + 65, not 128 + 2.
  const int64_t chunks = (m + tallest - 1) / tallest;
  const int64_t rows = (m + chunks - 1) / chunks;
  return (rows + kernels.row_step - 1) / kernels.row_step * kernels.row_step;
}

// Zen 5, K = N = 768, an eighth of L2 against half of it: 16 rows 29 and 32 us; 512 rows, widened again for each block,
// 611 and 596. K = N = 4096 with 64 columns instead of 128: 11% slower.
int64_t packed_columns(int64_t k, bool one_chunk) {
  constexpr int64_t kEnough = 128;
  const int64_t fit = isa::l2_bytes() / 2 / std::max<int64_t>(k, 1);
  const int64_t columns = one_chunk ? std::max(fit / 4, std::min(fit, kEnough)) : fit;
  return std::max<int64_t>(columns / kMaxTileColumns, 1) * kMaxTileColumns;
}

// A tile of AMX costs the same for 8 rows as for 16: two threads with 8 of 16 rows were slower than one (0.73 to 0.9 of
// its speed, 1.15 with half of the columns each); with 32 of 64 rows 1.6.
bool split_rows(const Kernels& kernels, int64_t m, int64_t n, int64_t k) {
  return m >= 128 || (m >= (kernels.row_step > 1 ? 64 : 16) && n * k < (int64_t{1} << 20));
}

bool in_l2(int64_t n, int64_t k) { return n * k <= isa::l2_bytes(); }

// Column panels shorter than this.
bool short_panels(int64_t k) { return k * kPanelColumns < 64 << 10; }

// One row from L3 and DRAM, GB/s as one stream and as four: K = 768 on Zen 4 92 and 26 against 82 and 21, on Zen 5 121
// and 43 against 116 and 40; K = 4096 on Zen 4 74 and 26 against 74 and 27, on Zen 5 122 and 43 against 123 and 43. Two
// rows of K = 768, on Zen 5 alone: 108 and 37 against 105 and 31; from L2, or of K = 4096, slower.
bool one_stream(int64_t rows, int64_t n, int64_t k) {
  if (rows == 2) return !in_l2(n, k) && short_panels(k) && isa::zen5();
  return rows == 1 && (in_l2(n, k) || (short_panels(k) && isa::amd()));
}

// Zen 5: 768 x 768 2.43 us with, 2.61 without; Zen 4 the same or 1% better. From L3 it is slower.
bool shuffle_stream(int64_t n, int64_t k) { return in_l2(n, k) && isa::amd(); }

// Zen 5, one row, 4096 x 4096 from L3: 150 us without, 168 to 174 with 1 KB ahead; from DRAM 44 and 32 GB/s. Short
// panels in four streams want it: K = 768 and 3, 4, 6 rows from DRAM 26, 25, 21 GB/s without, 29, 29, 29 with; from L3
// the same.
int64_t prefetch_ahead(const Kernels& kernels, int64_t rows, int64_t n, int64_t k) {
  if (in_l2(n, k)) return 0;
  if (isa::zen5() && kernels.level == isa::Level::avx512 && rows >= 3 && short_panels(k)) return 1024;
  return isa::amd() ? 0 : 1024;
}

// Zen 4, one row, GB/s of (K, N) = (768, 3072) from L3 and DRAM: 82 and 21 without, 92 and 26 with; of (4096, 4096): 66
// and 25, 74 and 27. 2 to 6 pages: the same; 8 lines of a page, or prefetcht0: slower. Zen 5: 1%.
int64_t prefetch_pages(int64_t n, int64_t k) { return !in_l2(n, k) && isa::amd() ? 3 : 0; }

// Zen 4, a result beyond L2: 512 x 768 x 3072 5820 us with, 6710 us without; one within L2 loses nothing.
bool prefetch_result() { return isa::amd(); }

// Zen 5, three quarters against at once: 0.8 to 1.2% at K = 384 and 768, 64 to 512 rows, nothing at 4096; Zen 4 is too
// late from the middle on.
bool prefetch_result_late() { return !isa::zen4(); }

// Few rows are what the op is for; more come in chunks whose codes stay in L2.
int64_t weight_only_rows(const Kernels& kernels, int64_t m) {
  const int64_t tallest = 4 * kernels.weight_only->max_rows;
  const int64_t chunks = (m + tallest - 1) / tallest;
  return (m + chunks - 1) / chunks;
}

const BitmapKernels* bitmap_kernels() {
#if defined(__x86_64__)
  if (isa::usable(isa::Level::avx512, isa::kLevelAvx512 | isa::kAvx512Vbmi2)) return &kBitmapAvx512Vbmi2;
#endif
  return nullptr;
}

// 4096 x 4096 at 50% zeros from DRAM (Zen 5): 2 / 4 / 8 / 16 KB ahead 231 / 191 / 168 / 172 us.
int64_t bitmap_prefetch_ahead(int64_t weight_bytes) { return weight_bytes > isa::l2_bytes() ? 8192 : 0; }

// Zen 5, 4096 x 4096, groups of 32, 64, 128, GB/s of codes: as four streams 97, 109, 113 from L3 and 33, 35, 38 from
// DRAM, as one 110, 114, 117 and 40, 41, 41. Zen 4 reads DRAM faster as four; other CPUs were not measured.
bool weight_only_stream(const Kernels& kernels, int64_t rows) {
  return rows == 1 && isa::zen5() && kernels.level == isa::Level::avx512;
}

// Four streams: 1 to 4 KB were the same within the noise of a busy machine; 2 KB was the better one in most runs from
// DRAM. One stream (Zen 5), 2, 4, 8, 16 KB: groups of 32 from DRAM 34, 38, 41, 38 GB/s, 32 without; from L3 the same.
int64_t weight_only_prefetch_ahead(int64_t weight_bytes, bool stream) {
  return weight_bytes <= isa::l2_bytes() ? 0 : stream ? 8192 : 2048;
}

// Zen 4, one row, 4096 x 4096, groups of 32 and 128: 72 and 81 GB/s from L3, 25 and 26 from DRAM; with 2 KB ahead 68
// and 73, 20 and 20; with neither 74 and 85, 23 and 24.
int64_t weight_only_prefetch_pages(int64_t weight_bytes) {
  return weight_bytes > isa::l2_bytes() && isa::zen4() ? 1 : 0;
}

}  // namespace fs::int8_gemm
