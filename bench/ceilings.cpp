// Ceilings of this machine: what one core (or `threads` of them) can compute from registers, read and copy.
//
// Built at bench time without -m flags: each function carries its own target attribute, so the library builds on
// any x86 and ceil_features() says at run time which functions may be called. Every function returns a rate
// (operations or bytes a second), the sum over the threads.
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define HAS_AVXVNNI 1
#else
#define HAS_AVXVNNI 0
#endif

// AMX by mnemonic and not by intrinsic, so it needs no flag: an assembler that knows AVX-VNNI knows AMX.
#if HAS_AVXVNNI && defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

#define AVX2 __attribute__((target("avx2,fma"), noinline))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"), noinline))
#define AVXVNNI __attribute__((target("avx2,avxvnni"), noinline))

namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// ---- compute ----
// One instruction after another on independent accumulators, from registers: enough of them to cover latency x ports.
// Registers are named in asm because compilers keep an array of accumulators in memory, which halves the rate.

constexpr int kIters = 4096;
constexpr int kNarrow = 12;  // ymm0..11; ymm14, 15 are the operands
constexpr int kWide = 20;    // zmm0..19; zmm30, 31 are the operands
constexpr int kMadd = 8;     // ymm0..7; products in ymm8..11

#define YMM12(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define ZMM20(f) YMM12(f) f(12) f(13) f(14) f(15) f(16) f(17) f(18) f(19)
#define CLOBBER_YMM                                                                                                   \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
      "xmm14", "xmm15"
#define CLOBBER_ZMM CLOBBER_YMM, "xmm16", "xmm17", "xmm18", "xmm19", "xmm30", "xmm31"

#define ZERO_Y(i) "vpxor %%xmm" #i ", %%xmm" #i ", %%xmm" #i "\n"
#define ZERO_Z(i) "vpxord %%zmm" #i ", %%zmm" #i ", %%zmm" #i "\n"
#define FMA_Y(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n"
#define FMA_Z(i) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #i "\n"
#define VNNI_Y(i) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #i "\n"
#define VNNI_Z(i) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #i "\n"
#define MADD(i) "vpmaddwd %%ymm14, %%ymm15, %%ymm" #i "\n"
#define ADD(from, i) "vpaddd %%ymm" #from ", %%ymm" #i ", %%ymm" #i "\n"

AVX2 void fma_avx2() {
  asm volatile(YMM12(ZERO_Y) ZERO_Y(14) ZERO_Y(15)::: CLOBBER_YMM);
  for (int i = 0; i < kIters; i++) asm volatile(YMM12(FMA_Y)::: CLOBBER_YMM);
}

AVX512 void fma_avx512() {
  asm volatile(ZMM20(ZERO_Z) ZERO_Z(30) ZERO_Z(31)::: CLOBBER_ZMM);
  for (int i = 0; i < kIters; i++) asm volatile(ZMM20(FMA_Z)::: CLOBBER_ZMM);
}

AVX512 void vnni_avx512() {
  for (int i = 0; i < kIters; i++) asm volatile(ZMM20(VNNI_Z)::: CLOBBER_ZMM);
}

#if HAS_AVXVNNI
AVXVNNI void vnni_avxvnni() {
  for (int i = 0; i < kIters; i++) asm volatile(YMM12(VNNI_Y)::: CLOBBER_YMM);
}
#endif

#if HAS_AMX
// What ldtilecfg reads: all eight tiles have 16 rows of 64 bytes.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "as the instruction reads it");
alignas(64) const TileConfig kTileConfig;

// Four sums from two tiles of each operand, as a 2 x 2 kernel has them. Tiles are a thread's own state: each body
// configures them, which is nothing against kIters products. ldtilecfg zeroes them.
void amx_int8() {
  asm volatile("ldtilecfg %0" ::"m"(kTileConfig));
  for (int i = 0; i < kIters; i += 4)
    asm volatile(
        "tdpbusd %tmm6, %tmm4, %tmm0\n"
        "tdpbusd %tmm7, %tmm4, %tmm1\n"
        "tdpbusd %tmm6, %tmm5, %tmm2\n"
        "tdpbusd %tmm7, %tmm5, %tmm3\n");
  asm volatile("tilerelease");
}

// Linux gives a process the tile registers only when it asks; the grant holds for all of its threads.
bool ask_for_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// Four products, then four additions: on Zen 1 (where both share a pipe) 6% faster than one by one.
AVX2 void maddwd_avx2() {
  for (int i = 0; i < kIters; i++)
    asm volatile(MADD(8) MADD(9) MADD(10) MADD(11) ADD(8, 0) ADD(9, 1) ADD(10, 2) ADD(11, 3) MADD(8) MADD(9) MADD(10)
                     MADD(11) ADD(8, 4) ADD(9, 5) ADD(10, 6) ADD(11, 7)::
                         : CLOBBER_YMM);
}

// ---- read: `streams` regions at once, each read in 256-byte steps; prefetch is a distance in bytes, 0 for none ----

template <int streams, bool prefetch>
AVX2 void read_avx2(const char* p, size_t bytes, size_t distance) {
  const size_t part = bytes / streams & ~size_t(255);
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  for (size_t i = 0; i < part; i += 256) {
#pragma GCC unroll 4
    for (int s = 0; s < streams; s++) {
      const char* q = p + s * part + i;
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++)
        if constexpr (prefetch) _mm_prefetch(q + distance + 64 * j, _MM_HINT_T0);
#pragma GCC unroll 2
      for (int j = 0; j < 256; j += 128) {
        a = _mm256_or_si256(a, _mm256_loadu_si256((const __m256i*)(q + j)));
        b = _mm256_or_si256(b, _mm256_loadu_si256((const __m256i*)(q + j + 32)));
        c = _mm256_or_si256(c, _mm256_loadu_si256((const __m256i*)(q + j + 64)));
        d = _mm256_or_si256(d, _mm256_loadu_si256((const __m256i*)(q + j + 96)));
      }
    }
  }
  a = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
  asm volatile("" ::"x"(a));  // or the loads would be dropped
}

template <int streams, bool prefetch>
AVX512 void read_avx512(const char* p, size_t bytes, size_t distance) {
  const size_t part = bytes / streams & ~size_t(255);
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (size_t i = 0; i < part; i += 256) {
#pragma GCC unroll 4
    for (int s = 0; s < streams; s++) {
      const char* q = p + s * part + i;
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++)
        if constexpr (prefetch) _mm_prefetch(q + distance + 64 * j, _MM_HINT_T0);
      a = _mm512_or_si512(a, _mm512_loadu_si512(q));
      b = _mm512_or_si512(b, _mm512_loadu_si512(q + 64));
      c = _mm512_or_si512(c, _mm512_loadu_si512(q + 128));
      d = _mm512_or_si512(d, _mm512_loadu_si512(q + 192));
    }
  }
  a = _mm512_or_si512(_mm512_or_si512(a, b), _mm512_or_si512(c, d));
  asm volatile("" ::"v"(a));
}

// ---- copy ----

template <bool streaming>
AVX2 void copy_avx2(char* to, const char* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 128) {
    _mm_prefetch(from + i + 4096, _MM_HINT_T0);
    _mm_prefetch(from + i + 4096 + 64, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int j = 0; j < 128; j += 32) {
      __m256i v = _mm256_load_si256((const __m256i*)(from + i + j));
      if constexpr (streaming)
        _mm256_stream_si256((__m256i*)(to + i + j), v);
      else
        _mm256_store_si256((__m256i*)(to + i + j), v);
    }
  }
  if (streaming) _mm_sfence();
}

// ---- running ----

// The best of many bursts: short ones, so that some fall between the time slices of whatever else runs.
struct Time {
  double seconds;  // of a burst
  int bursts, threads;
};

// make(thread) returns the body to repeat; per_call is the work of one body. All threads start each burst together.
template <class Make>
double run(Time time, double per_call, Make make) {
  std::atomic<int> arrived{0};
  std::vector<double> rates(size_t(time.threads) * time.bursts);
  auto worker = [&](int t) {
    auto body = make(t);
    body();
    for (int burst = 0; burst < time.bursts; burst++) {
      arrived++;
      while (arrived.load() < time.threads * (burst + 1)) std::this_thread::yield();
      auto start = Clock::now();
      double calls = 0, elapsed;
      do {
        body();
        calls++;
        elapsed = since(start);
      } while (elapsed < time.seconds);
      rates[size_t(burst) * time.threads + t] = calls * per_call / elapsed;
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < time.threads; t++) others.emplace_back(worker, t);
  worker(0);
  for (auto& other : others) other.join();
  double best = 0;
  for (int burst = 0; burst < time.bursts; burst++) {
    double sum = 0;
    for (int t = 0; t < time.threads; t++) sum += rates[size_t(burst) * time.threads + t];
    if (sum > best) best = sum;
  }
  return best;
}

// In huge pages where there are any, as packed weights are: in pages of 4 KB the TLB would be measured.
struct Buffer {
  char* p;
  explicit Buffer(size_t bytes, bool huge) {
    const size_t page = huge ? size_t{2} << 20 : 4096;
    p = static_cast<char*>(std::aligned_alloc(page, (bytes + page - 1) / page * page));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (p && huge) madvise(p, (bytes + page - 1) / page * page, MADV_HUGEPAGE);
#endif
    if (p) std::memset(p, 1, bytes);
  }
  ~Buffer() { std::free(p); }
  Buffer(const Buffer&) = delete;
};

using Read = void (*)(const char*, size_t, size_t);
constexpr Read kReads[2][4] = {
    {read_avx2<1, false>, read_avx2<1, true>, read_avx2<4, false>, read_avx2<4, true>},
    {read_avx512<1, false>, read_avx512<1, true>, read_avx512<4, false>, read_avx512<4, true>}};

}  // namespace

extern "C" {

// Bits: 1 avx2 + fma, 2 avxvnni, 4 avx512f, 8 avx512-vnni (with bw and vl), 16 amx-int8 (and asks for it).
unsigned ceil_features() {
  __builtin_cpu_init();
  unsigned bits = 0, a, b, c, d;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) bits |= 1;
  if ((bits & 1) && HAS_AVXVNNI && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4))) bits |= 2;
  if (__builtin_cpu_supports("avx512f")) bits |= 4;
  if ((bits & 4) && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    bits |= 8;
#if HAS_AMX
  const unsigned amx = (1u << 24) | (1u << 25);  // AMX-TILE, AMX-INT8
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & amx) == amx && ask_for_tiles()) bits |= 16;
#endif
  return bits;
}

// kind: 0 fma avx2, 1 fma avx512, 2 vpmaddwd + vpaddd avx2, 3 vpdpbusd avxvnni, 4 vpdpbusd avx512,
// 5 tdpbusd.
// Operations a second; a multiply and an add count as two. The caller has asked ceil_features().
double ceil_compute(int kind, double seconds, int bursts, int threads) {
  struct Kind {
    void (*body)();
    double ops;  // of one body; an instruction's: 2 x lanes (fp32), 2 x 16 products (vpmaddwd), 2 x bytes (vpdpbusd),
  };  // 2 x 16 rows x 16 columns x 64 (tdpbusd)
#if HAS_AVXVNNI
  constexpr auto avxvnni = vnni_avxvnni;
#else
  constexpr void (*avxvnni)() = nullptr;
#endif
#if HAS_AMX
  constexpr auto amx = amx_int8;
#else
  constexpr void (*amx)() = nullptr;
#endif
  constexpr double wide = double(kIters) * kWide, narrow = double(kIters) * kNarrow;
  const Kind kinds[] = {{fma_avx2, 16 * narrow}, {fma_avx512, 32 * wide},   {maddwd_avx2, 32.0 * kIters * kMadd},
                        {avxvnni, 64 * narrow},  {vnni_avx512, 128 * wide}, {amx, 2.0 * 16 * 16 * 64 * kIters}};
  if (kind < 0 || kind > 5 || !kinds[kind].body) return -1;
  return run({seconds, bursts, threads}, kinds[kind].ops, [&](int) { return kinds[kind].body; });
}

// width: 0 avx2, 1 avx512; variant: 0 one stream, 1 one stream + prefetch, 2 four streams, 3 four + prefetch.
// `bytes` is each thread's own set.
double ceil_read(int width, int variant, size_t bytes, double seconds, int bursts, int threads) {
  if (width < 0 || width > 1 || variant < 0 || variant > 3) return -1;
  const size_t used = bytes / 1024 * 1024;
  if (!used) return -1;
  std::vector<Buffer*> buffers;
  for (int t = 0; t < threads; t++) buffers.push_back(new Buffer(used, true));
  bool ok = true;
  for (auto* buffer : buffers) ok = ok && buffer->p;
  // Small sets are read many times between two looks at the clock.
  const size_t repeats = used < (1u << 18) ? (1u << 18) / used : 1;
  double rate = -1;
  if (ok)
    rate = run({seconds, bursts, threads}, double(used) * repeats, [&](int t) {
      const char* p = buffers[t]->p;
      return [=] {
        for (size_t r = 0; r < repeats; r++) kReads[width][variant](p, used, 2048);
      };
    });
  for (auto* buffer : buffers) delete buffer;
  return rate;
}

// One pass over `bytes` at `p`, in one of the patterns of ceil_read.
void ceil_pass(int width, int variant, const char* p, size_t bytes) { kReads[width][variant](p, bytes, 2048); }

// Seconds a pass over one of `copies` sets in turn; none counted before each was read once.
double ceil_pass_seconds(int width, int variant, size_t bytes, int copies, int repeats) {
  std::vector<std::unique_ptr<Buffer>> sets;
  for (int i = 0; i < copies; i++) {
    sets.push_back(std::make_unique<Buffer>(bytes, bytes >= size_t{2} << 20));
    if (!sets.back()->p) return -1;
  }
  const auto passes = [&](int count) {
    for (int i = 0; i < count; i++) ceil_pass(width, variant, sets[size_t(i) % sets.size()]->p, bytes);
  };
  passes(copies);
  const auto start = Clock::now();
  passes(repeats);
  return since(start) / repeats;
}

// Bytes read plus bytes written a second.
double ceil_copy(int streaming, size_t bytes, double seconds, int bursts, int threads) {
  const size_t used = bytes / 4096 * 4096;
  if (!used) return -1;
  std::vector<Buffer*> buffers;
  for (int t = 0; t < 2 * threads; t++) buffers.push_back(new Buffer(used, false));
  bool ok = true;
  for (auto* buffer : buffers) ok = ok && buffer->p;
  double rate = -1;
  if (ok)
    rate = run({seconds, bursts, threads}, 2.0 * used, [&](int t) {
      char* to = buffers[2 * t]->p;
      const char* from = buffers[2 * t + 1]->p;
      return [=] { streaming ? copy_avx2<true>(to, from, used) : copy_avx2<false>(to, from, used); };
    });
  for (auto* buffer : buffers) delete buffer;
  return rate;
}

}  // extern "C"
