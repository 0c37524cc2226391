// ldmatrix, mma and mma.sp by the layouts that csrc/runtime/cuda/ptx.h states.
#include <cstring>

#include "memory.h"
#include "runtime.h"
#include "shadow.h"

namespace fs::simt {
namespace {

// --- ldmatrix ---
struct LdmatrixArgument {
  uint32_t* registers;
  int count;
  bool transposed;
  const void* row;          // what the lane read
  const void* row_address;  // where
};

// Eight rows of 16 bytes pass through the 32 banks at once if they fall into different ones.
int extra_passes(void* const* all, int matrix) {
  int rows_of_bank[8] = {};
  int most = 0;
  for (int r = 0; r < 8; ++r) {
    const auto* mine = static_cast<const LdmatrixArgument*>(all[8 * matrix + r]);
    bool repeated = false;  // the same row again costs nothing
    for (int other = 0; other < r; ++other)
      repeated |= static_cast<const LdmatrixArgument*>(all[8 * matrix + other])->row_address == mine->row_address;
    if (repeated) continue;
    const int rows = ++rows_of_bank[reinterpret_cast<uintptr_t>(mine->row_address) / 16 % 8];
    most = rows > most ? rows : most;
  }
  return most - 1;
}

void run_ldmatrix(unsigned, void* const* all) {
  const auto& first = *static_cast<const LdmatrixArgument*>(all[0]);
  for (int m = 0; m < first.count; ++m) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(matrix[r], static_cast<LdmatrixArgument*>(all[8 * m + r])->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = first.transposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint32_t high = first.transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      static_cast<LdmatrixArgument*>(all[lane])->registers[m] = high << 16 | low;
    }
    if (!shadow::kOn) ldmatrix_conflicts += extra_passes(all, m);  // else the rows were read as by any other load
  }
}

// --- mma: operands of all lanes to matrices, the product, back ---
template <class D>
struct MmaArgument {
  D* d;
  const uint32_t *a, *b;
  uint32_t metadata;
  int selector;
};

template <class D>
const MmaArgument<D>& of(void* const* all, int lane) {
  return *static_cast<const MmaArgument<D>*>(all[lane]);
}

// The kElements elements of a register, lowest bits first, as T.
struct S8 {
  using Value = int16_t;
  using Sum = int32_t;
  static constexpr int kElements = 4;
  static Value element(uint32_t r, int i) { return static_cast<int8_t>(r >> (8 * i)); }
};
template <class Bits>
struct Half {
  using Value = float;
  using Sum = float;
  static constexpr int kElements = 2;
  static Value element(uint32_t r, int i) {
    const Bits bits{static_cast<uint16_t>(r >> (16 * i))};
    return Simd::load(&bits);
  }
};

// A: kK of k in four registers. B: kBK of k, in kBK / (4 * elements) registers.
template <class T, int kK>
void gather_a(void* const* all, typename T::Value (&a)[16][kK]) {
  constexpr int e = T::kElements;
  static_assert(kK == 8 * e);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < e; ++j)
        a[lane / 4 + 8 * (i % 2)][e * (lane % 4) + 4 * e * (i / 2) + j] =
            T::element(of<typename T::Sum>(all, lane).a[i], j);
}
template <class T, int kK>
void gather_b(void* const* all, typename T::Value (&b)[8][kK]) {
  constexpr int e = T::kElements;
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < kK / (4 * e); ++i)
      for (int j = 0; j < e; ++j)
        b[lane / 4][e * (lane % 4) + 4 * e * i + j] = T::element(of<typename T::Sum>(all, lane).b[i], j);
}

void add_products(void* const* all, const int16_t* a, const int16_t* b, int k) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int16_t* x = a + (lane / 4 + 8 * (i / 2)) * k;
      const int16_t* y = b + (2 * (lane % 4) + i % 2) * k;
      int32_t sum = 0;
      for (int j = 0; j < k; ++j) sum += x[j] * y[j];
      int32_t& d = of<int32_t>(all, lane).d[i];
      d = static_cast<int32_t>(static_cast<uint32_t>(d) + static_cast<uint32_t>(sum));
    }
}
void add_products(void* const* all, const float* a, const float* b, int k) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const float* x = a + (lane / 4 + 8 * (i / 2)) * k;
      const float* y = b + (2 * (lane % 4) + i % 2) * k;
      double sum = static_cast<double>(of<float>(all, lane).d[i]);
      for (int j = 0; j < k; ++j) sum += static_cast<double>(x[j]) * static_cast<double>(y[j]);
      of<float>(all, lane).d[i] = static_cast<float>(sum);
    }
}

template <class T>
void run_mma(unsigned, void* const* all) {
  constexpr int k = 8 * T::kElements;
  typename T::Value a[16][k], b[8][k];
  gather_a<T>(all, a);
  gather_b<T>(all, b);
  add_products(all, &a[0][0], &b[0][0], k);
}

// The four bits of metadata for chunk `chunk` (four k) of `row`.
template <class Bits>
uint32_t chunk_metadata(void* const* all, Half<Bits>, int row, int chunk) {
  const int quad = 4 * (row % 8), j = chunk / 4;
  const auto& argument = of<float>(all, quad + 2 * of<float>(all, quad).selector + j);
  return argument.metadata >> (16 * (row / 8) + 4 * (chunk % 4)) & 15;
}
uint32_t chunk_metadata(void* const* all, S8, int row, int chunk) {
  const int lane = 4 * (row % 8) + 2 * (chunk / 8) + row / 8;
  return of<int32_t>(all, lane).metadata >> (4 * (chunk % 8)) & 15;
}

const char* bad_metadata = nullptr;

template <class T>
void run_mma_sp(unsigned, void* const* all) {
  constexpr int half = 8 * T::kElements, k = 2 * half;
  typename T::Value kept[16][half], a[16][k] = {}, b[8][k];
  gather_a<T>(all, kept);
  gather_b<T>(all, b);
  for (int row = 0; row < 16; ++row)
    for (int chunk = 0; chunk < k / 4; ++chunk) {
      const uint32_t bits = chunk_metadata(all, T{}, row, chunk);
      const uint32_t first = bits & 3, second = bits >> 2;
      if (first >= second) bad_metadata = "metadata must name two positions, the lower one first";
      a[row][4 * chunk + static_cast<int>(first)] = kept[row][2 * chunk];
      a[row][4 * chunk + static_cast<int>(second)] = kept[row][2 * chunk + 1];
    }
  add_products(all, &a[0][0], &b[0][0], k);
}

constexpr unsigned kAllLanes = 0xffffffffu;

template <class D>
void multiply(const char* name, WarpFunction function, MmaArgument<D> argument, At at) {
  bad_metadata = nullptr;
  warp_operation(kAllLanes, name, function, &argument, at);
  if (bad_metadata != nullptr) fail(std::string(name) + " at " + place(at) + ": " + bad_metadata);
}

}  // namespace

void ldmatrix(uint32_t* registers, int count, bool transposed, const void* row, const void* row_address, At at) {
  if (static_cast<int>(running_number() % 32) < 8 * count) {
    if (!in_shared(row_address))
      fail("ptx::ldmatrix at " + place(at) + " by " + thread_name(running_number()) +
           ": the row is not in shared memory");
    if (reinterpret_cast<uintptr_t>(row_address) % 16 != 0)
      fail("misaligned: ptx::ldmatrix at " + place(at) + " by " + thread_name(running_number()) +
           ": a row must lie at a multiple of 16 bytes");
  }
  LdmatrixArgument argument{registers, count, transposed, row, row_address};
  warp_operation(kAllLanes, "ptx::ldmatrix", &run_ldmatrix, &argument, at);
}

void mma_s8(int32_t* d, const uint32_t* a, const uint32_t* b, At at) {
  multiply<int32_t>("ptx::mma_s8", &run_mma<S8>, {d, a, b, 0, 0}, at);
}
void mma_f16(float* d, const uint32_t* a, const uint32_t* b, At at) {
  multiply<float>("ptx::mma_f16", &run_mma<Half<f16>>, {d, a, b, 0, 0}, at);
}
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b, At at) {
  multiply<float>("ptx::mma_bf16", &run_mma<Half<bf16>>, {d, a, b, 0, 0}, at);
}
void mma_sp_f16(float* d, const uint32_t* a, const uint32_t* b, uint32_t metadata, int selector, At at) {
  multiply<float>("ptx::mma_sp_f16", &run_mma_sp<Half<f16>>, {d, a, b, metadata, selector}, at);
}
void mma_sp_bf16(float* d, const uint32_t* a, const uint32_t* b, uint32_t metadata, int selector, At at) {
  multiply<float>("ptx::mma_sp_bf16", &run_mma_sp<Half<bf16>>, {d, a, b, metadata, selector}, at);
}
void mma_sp_s8(int32_t* d, const uint32_t* a, const uint32_t* b, uint32_t metadata, At at) {
  multiply<int32_t>("ptx::mma_sp_s8", &run_mma_sp<S8>, {d, a, b, metadata, 0}, at);
}

}  // namespace fs::simt
