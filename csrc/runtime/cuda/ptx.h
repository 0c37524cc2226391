// Thin wrappers round the PTX instructions that our kernels use, for sm_80 and later: the only PTX of the library.
// Each has its CPU twin (simt::), which tests/cuda_on_cpu/ implements. Included by device.h.
//
// Contents     16-byte loads and stores with cache hints; cp.async; ldmatrix; mma; mma.sp (2:4 sparse).
// Warp-wide    ldmatrix and mma are executed by all 32 lanes together, at the same line; they order no memory.
// Layouts      From the PTX ISA, 9.7.14.5 and 9.7.14.6. With g = lane / 4 and t = lane % 4, four bytes a register, the
//              element that comes first in the lowest bits:
//
//   C, D  16 x 8       register i: row g + 8 * (i / 2), column 2 * t + i % 2
//   A  16 x 32 s8      register i: row g + 8 * (i % 2), k 4 * t + 16 * (i / 2) .. + 3
//   B  32 x 8 s8       register i: column g,            k 4 * t + 16 * i .. + 3
//   A  16 x 16 f16     register i: row g + 8 * (i % 2), k 2 * t + 8 * (i / 2) .. + 1
//   B  16 x 8 f16      register i: column g,            k 2 * t + 8 * i .. + 1
// So both types are rows of 32 bytes (A) and columns of 32 bytes (B): the same ldmatrix serves both.
#pragma once

namespace fs::ptx {

#if defined(FS_SIMT)
#define FS_LAST_AT , ::fs::simt::At at = ::fs::simt::At::here()
#define FS_WHOLE(v) asm("" : "+m"(v))  // or gcc makes four accesses of one, and bank conflicts are miscounted
#else
#define FS_LAST_AT
#define FS_WHOLE(v)
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// --- 16 bytes of global memory, p at a multiple of 16 ----------------------------------------------------------------

__device__ __forceinline__ uint4 load16(const void* p) {
#if defined(FS_SIMT)
  simt::check_alignment(p, 16, "ptx::load16");
#endif
  uint4 v = *static_cast<const uint4*>(p);
  FS_WHOLE(v);
  return v;
}

// For what is read once and written by nobody during the launch: past L1.
__device__ __forceinline__ uint4 load16_once(const void* p) {
#if defined(FS_SIMT)
  simt::check_alignment(p, 16, "ptx::load16_once");
  return *static_cast<const uint4*>(p);
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
#endif
}

__device__ __forceinline__ void store16(void* p, uint4 v) {
#if defined(FS_SIMT)
  simt::check_alignment(p, 16, "ptx::store16");
#endif
  FS_WHOLE(v);
  *static_cast<uint4*>(p) = v;
}

// 8 bytes, p at a multiple of 8.
__device__ __forceinline__ uint2 load8(const void* p) {
#if defined(FS_SIMT)
  simt::check_alignment(p, 8, "ptx::load8");
#endif
  uint2 v = *static_cast<const uint2*>(p);
  FS_WHOLE(v);
  return v;
}

__device__ __forceinline__ void store8(void* p, uint2 v) {
#if defined(FS_SIMT)
  simt::check_alignment(p, 8, "ptx::store8");
#endif
  FS_WHOLE(v);
  *static_cast<uint2*>(p) = v;
}

// For what nobody reads soon: first to leave the caches.
__device__ __forceinline__ void store16_stream(void* p, uint4 v) {
#if defined(FS_SIMT)
  simt::check_alignment(p, 16, "ptx::store16_stream");
  *static_cast<uint4*>(p) = v;
#else
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#endif
}

// --- cp.async: global to shared memory, behind the thread's back
// ------------------------------------------------------ kBytes 4, 8 or 16; both addresses at multiples of it. Only the
// first `bytes` are read, the rest of the target becomes 0; with 0 nothing is read, but `source` must still be a valid
// address. What arrived after a wait is seen by the issuing thread; by the others after a barrier behind that wait.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* target, const void* source, int bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async moves 4, 8 or 16 bytes");
#if defined(FS_SIMT)
  simt::check_alignment(target, kBytes, "the target of ptx::cp_async");
  simt::check_alignment(source, kBytes, "the source of ptx::cp_async");
  struct alignas(kBytes) Block {
    unsigned char byte[kBytes];
  };
  Block payload{};
  if (bytes == kBytes)
    payload = *static_cast<const Block*>(source);
  else
    for (int i = 0; i < bytes; ++i) payload.byte[i] = static_cast<const unsigned char*>(source)[i];
  Block spoiled;
  __builtin_memset(&spoiled, 0xff, kBytes);
  *static_cast<Block*>(target) = spoiled;
  simt::issue_async(target, &payload, kBytes);
#else
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(target)), "l"(source),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
#endif
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void cp_async_commit() {
#if defined(FS_SIMT)
  simt::commit_async();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kLeft of the groups committed last are still under way.
template <int kLeft>
__device__ __forceinline__ void cp_async_wait() {
#if defined(FS_SIMT)
  simt::wait_async(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// --- ldmatrix: 8 x 8 matrices of two-byte elements from shared memory
// ------------------------------------------------- Matrix m has its 8 rows of 16 bytes where lanes 8m .. 8m+7 point
// (each at a multiple of 16); the other lanes' `row` is not read. It arrives in register m: row g, bytes 4t .. 4t+3.
// trans: transposed, elements (2t, g) and (2t+1, g).
#if defined(FS_SIMT)
#define FS_LDMATRIX(name, count, trans, ...)                                               \
  __device__ __forceinline__ void name(uint32_t (&r)[count], const void* row FS_LAST_AT) { \
    uint4 bytes{};                                                                         \
    if (threadIdx.x % 32 < 8 * count) bytes = *static_cast<const uint4*>(row);             \
    simt::ldmatrix(r, count, trans, &bytes, row, at);                                      \
  }
FS_LDMATRIX(ldmatrix_x1, 1, false)
FS_LDMATRIX(ldmatrix_x2, 2, false)
FS_LDMATRIX(ldmatrix_x4, 4, false)
FS_LDMATRIX(ldmatrix_x1_trans, 1, true)
FS_LDMATRIX(ldmatrix_x2_trans, 2, true)
FS_LDMATRIX(ldmatrix_x4_trans, 4, true)
#undef FS_LDMATRIX
#else
#define FS_LDMATRIX(trans)                                                                                \
  __device__ __forceinline__ void ldmatrix_x1##trans(uint32_t (&r)[1], const void* row) {                 \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" FS_LDMATRIX_SUFFIX ".shared.b16 {%0}, [%1];"             \
                 : "=r"(r[0])                                                                             \
                 : "r"(shared_address(row))                                                               \
                 : "memory");                                                                             \
  }                                                                                                       \
  __device__ __forceinline__ void ldmatrix_x2##trans(uint32_t (&r)[2], const void* row) {                 \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" FS_LDMATRIX_SUFFIX ".shared.b16 {%0, %1}, [%2];"         \
                 : "=r"(r[0]), "=r"(r[1])                                                                 \
                 : "r"(shared_address(row))                                                               \
                 : "memory");                                                                             \
  }                                                                                                       \
  __device__ __forceinline__ void ldmatrix_x4##trans(uint32_t (&r)[4], const void* row) {                 \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" FS_LDMATRIX_SUFFIX ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                         \
                 : "r"(shared_address(row))                                                               \
                 : "memory");                                                                             \
  }
#define FS_LDMATRIX_SUFFIX ""
FS_LDMATRIX()
#undef FS_LDMATRIX_SUFFIX
#define FS_LDMATRIX_SUFFIX ".trans"
FS_LDMATRIX(_trans)
#undef FS_LDMATRIX_SUFFIX
#undef FS_LDMATRIX
#endif

// --- mma: D += A * B on the tensor cores, one warp, in the layouts above
// ------------------------------------------------

// m16n8k32, s8 * s8 summed in s32 (wraps round, as CUDA's does without .satfinite).
__device__ __forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] FS_LAST_AT) {
#if defined(FS_SIMT)
  simt::mma_s8(d, a, b, at);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// m16n8k16, f16 * f16 and bf16 * bf16 summed in float32. The order of the sum is not specified: compare with a
// tolerance.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] FS_LAST_AT) {
#if defined(FS_SIMT)
  simt::mma_f16(d, a, b, at);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] FS_LAST_AT) {
#if defined(FS_SIMT)
  simt::mma_bf16(d, a, b, at);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// --- mma.sp: A is 2:4 sparse; two of every four consecutive k are stored, with their positions in the metadata
// ---------- A holds the kept values as mma's A of half the k does. B is twice as long: register i holds
//   f16  k 2 * t + 8 * i .. + 1        s8  k 4 * t + 16 * i .. + 3        (column g, i < 4)
// Metadata: 4 bits for every four k: the position of the first kept value in the lower two, of the second in the upper
// two, first < second; the lowest k in the lowest bits.
//   f16  lanes 2 * kSelector + j of a quad hold k 16j .. 16j+15: of row g in the low half, of row g + 8 in the high
//   half s8   lane t of a quad holds k 32 * (t / 2) .. + 31 of row g + 8 * (t % 2)
// The ISA text gives the metadata's places as pictures only: check these first when a GPU is at hand, s8 above all.

// m16n8k32
template <int kSelector>
__device__ __forceinline__ void mma_sp_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                           uint32_t metadata FS_LAST_AT) {
  static_assert(kSelector == 0 || kSelector == 1, "two lanes of each quad hold the metadata");
#if defined(FS_SIMT)
  simt::mma_sp_f16(d, a, b, metadata, kSelector, at);
#else
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
        "n"(kSelector));
#endif
}

template <int kSelector>
__device__ __forceinline__ void mma_sp_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                            uint32_t metadata FS_LAST_AT) {
  static_assert(kSelector == 0 || kSelector == 1, "two lanes of each quad hold the metadata");
#if defined(FS_SIMT)
  simt::mma_sp_bf16(d, a, b, metadata, kSelector, at);
#else
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
        "n"(kSelector));
#endif
}

// m16n8k64
__device__ __forceinline__ void mma_sp_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                          uint32_t metadata FS_LAST_AT) {
#if defined(FS_SIMT)
  simt::mma_sp_s8(d, a, b, metadata, at);
#else
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0;"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata));
#endif
}

}  // namespace fs::ptx
