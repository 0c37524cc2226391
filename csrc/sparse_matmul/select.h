// The table of kernels and the shape thresholds of the family: short pure functions, each with its measurement.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../families.h"
#include "../runtime/isa.h"
#include "sparse_matmul.h"

namespace fs::sparse_matmul {

// The first row that fits this CPU and the cap in force. Throws what isa::current_level() throws.
const Kernels& select();

// Every row of the table, best first (whether or not this CPU runs it), and the same for `_C.kernels()`.
std::vector<const Kernels*> table();
std::vector<KernelInfo> kernel_infos();

// Test hook behind `_C.spoil_kernel`: the row of this name gets its first result wrong by one; "" mends it.
// Throws std::invalid_argument for a name that is not in the table. Not to be called while kernels run.
void spoil(const std::string& name);

// Test hook for the row avx512, which avx512vbmi2 hides (runtime/table.h).
void pin(const std::string& name);

// The rows of the next panel of x when so many are left: the widest that they fill, 8 for the last ones.
inline int64_t panel_lanes(int64_t left) { return left > 16 ? 32 : left > 8 ? 16 : 8; }

// Threads that have rows of their own get multiples of so many.
inline constexpr int64_t kRowsShare = 16;

// Elements of x from which threads fill the panels together: it takes a second parallel region, 1 to 3 us.
inline constexpr int64_t kSharedPanels = int64_t{1} << 17;

// The same for blocks and nm packs.
inline int64_t tile_lanes(int64_t left) { return left > 32 ? 64 : panel_lanes(left); }

// True: a blocks or nm pack is multiplied with outputs as lanes, not rows of x. docs/kernels/sparse_matmul.md
inline bool few_rows(const Pack& w, int64_t m) {
  if (w.format == kNm) return m <= 24;
  return m <= (w.block >> 8 == 1 ? 4 : 8);  // blocks of one output, of more
}

// FewArgs::prefetch for a sell8 pack and so many rows of x. docs/kernels/sparse_matmul.md
bool prefetch_sell8(const Pack& w, int64_t rows);

// True: the work is too small for a second thread.
inline bool one_thread(int64_t m, int64_t stored) { return m * stored < (int64_t{1} << 16); }

}  // namespace fs::sparse_matmul
