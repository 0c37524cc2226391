// spmm and sddmm from a structure (formats/structure.h), CUDA sm_80: its tables become the CSR of W or of W^T in
// scratch, at every call; then come the kernels of sm80_csr.cu.
// Why      a structure is one format for all devices, 11 bytes a non-zero; the CSR of both would be 12 more, of which a
//          CPU reads none. At 128 rows of x a value costs 128 fmaf, so its few loads and stores here are little.
// W        values lie in the order of CSR already: the ends of the rows, and a column for each value.
// W^T      chunks of 256 rows x blocks of 128 columns. A block of threads sets a bit for each value; how many bits of a
//          column are set goes to a table [chunks][K], whose sums over chunks and columns say where a column's values
//          of a chunk begin (one block of threads); then the bits below a value's own are its rank. So rows ascend in a
//          column whatever the order of threads is.
// Damage   rows are compared with N, columns with K, places with the number of values. Nothing outside is read or
//          written; of values that claim one place the last one stays.
// Bound    5 bytes a value read or written (W), 10 (W^T), and latency: a warp takes one row of a block at a time.
// Open     the sums of columns are one thread block's: for every 1024 columns as many trips to L2 as there are chunks.
// Measured never run on hardware.
#include <climits>

#include "../../runtime/cuda/device.h"
#include "sm80.h"

namespace fs::sparse_matmul::sm80 {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kOutputs = static_cast<int>(kSampleOutputs), kColumns = static_cast<int>(kSampleColumns);
constexpr int kThreads = kOutputs;
constexpr int kWarps = kThreads / 32;
constexpr int kWords = kOutputs / 32;  // of a column's bits
constexpr int kScanThreads = 1024;

struct Tables {
  int64_t n, k, nonzeros, blocks;
  const uint8_t* order;
  const uint32_t* start;
  const uint8_t* index;
};

// What the tables of a chunk and a block say of a thread's row: which it is in the chunk, and its values.
struct Row {
  int row, count;
  uint32_t start;
};
__device__ __forceinline__ Row row_of(const Tables& t, int64_t unit, int thread) {
  const uint8_t* order = t.order + unit * 2 * kOutputs;
  return {order[thread], order[kOutputs + thread], t.start[unit * kOutputs + thread]};
}

// The ends of the rows of a chunk.
__global__ void __launch_bounds__(kThreads) row_ends(Tables t, int32_t* begin, int32_t* end) {
  FS_SHARED(unsigned, first, [kOutputs]);
  FS_SHARED(unsigned, count, [kOutputs]);
  const int thread = static_cast<int>(threadIdx.x);
  first[thread] = UINT_MAX;
  count[thread] = 0;
  __syncthreads();
#pragma unroll 4
  for (int64_t block = 0; block < t.blocks; ++block) {
    const Row r = row_of(t, blockIdx.x * t.blocks + block, thread);
    if (r.count == 0) continue;
    atomicMin(&first[r.row], r.start);                         // conflicts as the rows are
    atomicAdd(&count[r.row], static_cast<unsigned>(r.count));  // conflicts as the rows are
  }
  __syncthreads();
  const int64_t row = int64_t{blockIdx.x} * kOutputs + thread;
  if (row >= t.n) return;
  const int64_t from = count[thread] == 0 ? 0 : min(static_cast<int64_t>(first[thread]), t.nonzeros);
  begin[row] = static_cast<int32_t>(from);
  end[row] = static_cast<int32_t>(min(from + count[thread], t.nonzeros));
}

__device__ __forceinline__ bool is_inside(const Tables& t, int64_t block, int column) {
  return column < kColumns && block * kColumns + column < t.k;
}

// Calls each(row in the chunk, column in the block, place) for the values of a chunk and a block, lane by lane.
template <class Each>
__device__ __forceinline__ void for_values(const Tables& t, const Row* rows, const Each& each) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int r = warp; r < kOutputs; r += kWarps) {
    const Row row = rows[r];
    for (int i = lane; i < row.count; i += 32) {
      const int64_t place = static_cast<int64_t>(row.start) + i;
      if (place >= t.nonzeros) break;
      each(row.row, t.index[place], place);
    }
  }
}

// The column of each value, by place.
__global__ void __launch_bounds__(kThreads) value_columns(Tables t, int32_t* col) {
  FS_SHARED(Row, rows, [kOutputs]);
  const int64_t block = blockIdx.x % t.blocks;
  rows[threadIdx.x] = row_of(t, blockIdx.x, static_cast<int>(threadIdx.x));
  __syncthreads();
  for_values(t, rows, [&](int, int column, int64_t place) {
    col[place] = is_inside(t, block, column) ? static_cast<int32_t>(block * kColumns + column) : -1;
  });
}

// Of a chunk and a block: bits[word][column], bit r: row 32 * word + r has a value there. Ends in a barrier.
__device__ __forceinline__ void set_bits(const Tables& t, Row* rows, unsigned (&bits)[kWords][kColumns]) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t chunk = blockIdx.x / t.blocks, block = blockIdx.x % t.blocks;
  Row own = row_of(t, blockIdx.x, thread);
  if (chunk * kOutputs + own.row >= t.n) own.count = 0;
  rows[thread] = own;
#pragma unroll
  for (int i = thread; i < kWords * kColumns; i += kThreads) bits[i / kColumns][i % kColumns] = 0;
  __syncthreads();
  for_values(t, rows, [&](int row, int column, int64_t) {
    if (is_inside(t, block, column)) atomicOr(&bits[row / 32][column], 1u << row % 32);  // conflicts as the columns are
  });
  __syncthreads();
}

// counts[chunk][column]
__global__ void __launch_bounds__(kThreads) count_columns(Tables t, uint32_t* counts) {
  FS_SHARED(Row, rows, [kOutputs]);
  FS_SHARED(unsigned, bits, [kWords][kColumns]);
  set_bits(t, rows, bits);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column = blockIdx.x % t.blocks * kColumns + thread;
  if (thread >= kColumns || column >= t.k) return;
  unsigned count = 0;
#pragma unroll
  for (int word = 0; word < kWords; ++word) count += static_cast<unsigned>(__popc(bits[word][thread]));
  counts[blockIdx.x / t.blocks * t.k + column] = count;
}

// The ends of the columns; counts become where a column's values of each chunk begin. One block of threads.
__global__ void __launch_bounds__(kScanThreads)
    column_ends(int64_t chunks, int64_t k, uint32_t* counts, int32_t* begin, int32_t* end) {
  FS_SHARED(unsigned, of_warp, [kScanThreads / 32]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  unsigned before = 0;  // of the columns that are done
  for (int64_t column0 = 0; column0 < k; column0 += kScanThreads) {
    const int64_t column = column0 + thread;
    unsigned count = 0;
    if (column < k) {
#pragma unroll 8
      for (int64_t chunk = 0; chunk < chunks; ++chunk) count += counts[chunk * k + column];
    }
    unsigned sum = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned other = __shfl_up_sync(kAll, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) of_warp[warp] = sum;
    __syncthreads();
    unsigned warps_before = before;
    for (int w = 0; w < kScanThreads / 32; ++w) {
      if (w < warp) warps_before += of_warp[w];
      before += of_warp[w];
    }
    __syncthreads();  // nobody reads the sums of this turn any more
    if (column >= k) continue;
    unsigned at = warps_before + sum - count;
    begin[column] = static_cast<int32_t>(at);
    end[column] = static_cast<int32_t>(at + count);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const unsigned own = counts[chunk * k + column];
      counts[chunk * k + column] = at;
      at += own;
    }
  }
}

// The rows and places of the values by columns; begin: [chunk][column], from column_ends().
__global__ void __launch_bounds__(kThreads)
    fill_columns(Tables t, const uint32_t* begin, int32_t* row_there, int32_t* place_there) {
  FS_SHARED(Row, rows, [kOutputs]);
  FS_SHARED(unsigned, bits, [kWords][kColumns]);
  FS_SHARED(unsigned, first, [kWords][kColumns]);  // of the rows of a word
  set_bits(t, rows, bits);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t chunk = blockIdx.x / t.blocks, block = blockIdx.x % t.blocks;
  if (thread < kColumns) {
    const int64_t column = block * kColumns + thread;
    unsigned at = column < t.k ? begin[chunk * t.k + column] : 0;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      first[word][thread] = at;
      at += static_cast<unsigned>(__popc(bits[word][thread]));
    }
  }
  __syncthreads();
  for_values(t, rows, [&](int row, int column, int64_t place) {
    if (!is_inside(t, block, column)) return;
    const unsigned below = bits[row / 32][column] & ((1u << row % 32) - 1);              // conflicts as the columns are
    const unsigned at = first[row / 32][column] + static_cast<unsigned>(__popc(below));  // conflicts as the columns are
    if (at >= t.nonzeros) return;
    row_there[at] = static_cast<int32_t>(chunk * kOutputs + row);
    place_there[at] = static_cast<int32_t>(place);
  });
}

int64_t chunks_of(const StructureView& s) { return (s.n + kOutputs - 1) / kOutputs; }
int64_t blocks_of(const StructureView& s) { return (s.k + kColumns - 1) / kColumns; }
int64_t padded(int64_t ints) { return (ints + 3) / 4 * 4; }

int64_t csr_ints(const StructureView& s, bool transposed) {
  if (transposed) return padded(2 * s.k + 2 * s.nonzeros + chunks_of(s) * s.k);
  return padded(2 * s.n + s.nonzeros);
}

// The CSR of W or of W^T in `scratch`.
Csr csr_of(const StructureView& s, bool transposed, int32_t* scratch, cudaStream_t stream) {
  const int64_t chunks = chunks_of(s), blocks = blocks_of(s), units = chunks * blocks;
  const Tables t{s.n, s.k, s.nonzeros, blocks, s.order, s.start, s.index};
  const auto start = [&](int64_t grid, int threads, auto kernel, auto... args) {
    if (grid > 0) launch({dim3(static_cast<unsigned>(grid)), dim3(threads), 0, stream}, kernel, args...);
  };
  const int64_t rows = transposed ? s.k : s.n;
  int32_t *begin = scratch, *end = begin + rows, *col = end + rows;
  if (!transposed) {
    start(chunks, kThreads, row_ends, t, begin, end);
    start(units, kThreads, value_columns, t, col);
    return {s.n, s.k, s.nonzeros, begin, end, col, nullptr};
  }
  int32_t* place = col + s.nonzeros;
  auto* counts = reinterpret_cast<uint32_t*>(place + s.nonzeros);
  start(units, kThreads, count_columns, t, counts);
  start(1, kScanThreads, column_ends, chunks, s.k, counts, begin, end);
  start(units, kThreads, fill_columns, t, static_cast<const uint32_t*>(counts), col, place);
  return {s.k, s.n, s.nonzeros, begin, end, col, place};
}

}  // namespace

int64_t product_scratch_bytes(const StructureView& weight, bool transposed, int64_t m) {
  const Csr csr{transposed ? weight.k : weight.n, transposed ? weight.n : weight.k, weight.nonzeros, {}, {}, {}, {}};
  return 4 * (csr_ints(weight, transposed) + spmm_scratch_floats(csr, m));
}

void product(const StructureProduct& args, void* scratch, void* stream) {
  const StructureView& w = *args.weight;
  if (args.m == 0 || (args.transposed ? w.k : w.n) == 0) return;
  auto* ints = static_cast<int32_t*>(scratch);
  const Csr csr = csr_of(w, args.transposed, ints, static_cast<cudaStream_t>(stream));
  auto* floats = reinterpret_cast<float*>(ints + csr_ints(w, args.transposed));
  spmm({csr, args.values, args.x, args.m, args.bias, args.activation, args.y, args.header}, floats, stream);
}

int64_t sample_scratch_bytes(const StructureView& weight, int64_t m) {
  const Csr csr{weight.n, weight.k, weight.nonzeros, nullptr, nullptr, nullptr, nullptr};
  return 4 * (csr_ints(weight, false) + sddmm_scratch_floats(csr, m));
}

void sample(const SampleProductArgs& args, const HeaderIs& header, void* scratch, void* stream) {
  const StructureView& w = *args.weight;
  if (w.nonzeros == 0) return;
  auto* ints = static_cast<int32_t*>(scratch);
  const Csr csr = csr_of(w, false, ints, static_cast<cudaStream_t>(stream));
  auto* floats = reinterpret_cast<float*>(ints + csr_ints(w, false));
  sddmm({csr, args.p, args.q, args.m, args.values, header}, floats, stream);
}

}  // namespace fs::sparse_matmul::sm80
