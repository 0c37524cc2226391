// The matrix instructions of ptx.h fed element by element from row-major matrices, by the layouts that ptx.h states.
#include "../../csrc/runtime/cuda/device.h"
#include "runtime/entry.h"

namespace {

// Registers of A [16][k] and B [k][8], of elements of kBytes, as words of 4 bytes along k; b is given as [8][k].
template <int kRegisters>
__device__ void load_a(const uint32_t* a, int words, uint32_t (&r)[kRegisters]) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  for (int i = 0; i < kRegisters; ++i) r[i] = a[(g + 8 * (i % 2)) * words + t + 4 * (i / 2)];
}
template <int kRegisters>
__device__ void load_b(const uint32_t* b, int words, uint32_t (&r)[kRegisters]) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  for (int i = 0; i < kRegisters; ++i) r[i] = b[g * words + t + 4 * i];
}
template <class D>
__device__ void store_d(const D (&d)[4], D* out) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  for (int i = 0; i < 4; ++i) out[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = d[i];
}

__global__ void product(int kind, const uint32_t* a, const uint32_t* b, const uint32_t* metadata, void* out) {
  uint32_t ra[4], rb[2], rb4[4];
  load_a(a, 8, ra);
  float f[4] = {};
  int32_t s[4] = {};
  const uint32_t meta = kind >= 3 ? metadata[threadIdx.x] : 0;
  if (kind < 3)
    load_b(b, 8, rb);
  else
    load_b(b, 16, rb4);
  switch (kind) {
    case 0: fs::ptx::mma_s8(s, ra, rb); break;
    case 1: fs::ptx::mma_f16(f, ra, rb); break;
    case 2: fs::ptx::mma_bf16(f, ra, rb); break;
    case 3: fs::ptx::mma_sp_s8(s, ra, rb4, meta); break;
    case 4: fs::ptx::mma_sp_f16<1>(f, ra, rb4, meta); break;
    default: fs::ptx::mma_sp_bf16<1>(f, ra, rb4, meta); break;
  }
  if (kind == 0 || kind == 3)
    store_d(s, static_cast<int32_t*>(out));
  else
    store_d(f, static_cast<float*>(out));
}

}  // namespace

extern "C" FS_ENTRY const char* wrappers_product(int kind, const uint32_t* a, const uint32_t* b,
                                                 const uint32_t* metadata, void* out) {
  return fs::simt::guarded([&] { fs::launch({dim3(1), dim3(32), 0, nullptr}, product, kind, a, b, metadata, out); });
}
