// The table of kernels and the shape thresholds of the family: short pure functions, each with its measurement.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../families.h"
#include "../runtime/isa.h"
#include "int8_gemm.h"

namespace fs::int8_gemm {

// The first row that fits this CPU and the cap in force. Throws what isa::current_level() throws.
const Kernels& select();

// Every row of the table, best first (whether or not this CPU runs it), and the same for `_C.kernels()`.
std::vector<const Kernels*> table();
std::vector<KernelInfo> kernel_infos();

// Test hook behind `_C.spoil_kernel`: the row of this name gets its first sum wrong by one; "" mends it.
// Throws std::invalid_argument for a name that is not in the table. Not to be called while kernels run.
void spoil(const std::string& name);

// Columns of one tile call for tiles of so many rows.
inline int64_t columns_for(const Kernels& k, int64_t rows) {
  return rows <= k.few_rows ? k.few_columns : k.many_columns;
}

// Row tiles from which on a column panel is widened once for all of them: widening costs what it saves three tiles.
inline constexpr int64_t kTilesToWiden = 5;

// Rows of x that are quantized and multiplied at a time: the A panel must stay in L2 beside two column panels.
int64_t chunk_rows(const Kernels& kernels, int64_t m, int64_t k);

// Columns of an unpacked B that int8_mm packs at a time: half of L2; an eighth, so that B passes through L2 beside
// them, where a chunk holds all rows and no row is widened twice for it.
int64_t packed_columns(int64_t k, bool one_chunk);

// True: threads share the rows; false: they share the columns and each quantizes all of x.
bool split_rows(const Kernels& kernels, int64_t m, int64_t n, int64_t k);

// weight_only_linear with a bitmap: what the CPU and the cap in force allow, or null.
const BitmapKernels* bitmap_kernels();
int64_t bitmap_prefetch_ahead(int64_t weight_bytes);  // bytes of codes, 0: the pack lies in L2

// weight_only_linear: rows of x that are quantized and multiplied at a time.
int64_t weight_only_rows(const Kernels& kernels, int64_t m);

// weight_only_linear, u4: True: so many rows read one column panel after the other, false: four side by side.
bool weight_only_stream(const Kernels& kernels, int64_t rows);

// The weights of a layer stay in L2 between calls, as far as their size goes.
bool in_l2(int64_t n, int64_t k);

// True: tiles of so many rows (one or two) read one column panel after the other, false: four side by side.
bool one_stream(int64_t rows, int64_t n, int64_t k);
bool shuffle_stream(int64_t n, int64_t k);

// Bytes that few-row tiles prefetch ahead of their use; 0 where the weights lie in L2, or the CPU is better at it.
int64_t prefetch_ahead(const Kernels& kernels, int64_t rows, int64_t n, int64_t k);
int64_t weight_only_prefetch_ahead(int64_t weight_bytes, bool stream);

// Pages ahead of its use that a page's beginning is prefetched; 0 where the weights lie in L2, or the CPU is not one
// that this was measured on.
int64_t prefetch_pages(int64_t n, int64_t k);
int64_t weight_only_prefetch_pages(int64_t weight_bytes);

// True: tiles of many rows bring the lines of their result to be written, so that stores do not wait for them.
bool prefetch_result();
bool prefetch_result_late();  // not at a tile's start, where the last one's stores are still on their way

}  // namespace fs::int8_gemm
