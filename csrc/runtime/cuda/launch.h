// fs::launch, the only way a kernel of ours is started, and the only two ways to shared memory. Included by device.h.
#pragma once

#if defined(FS_SIMT)

// FS_SHARED(int, tile, [8][64]): a shared array, aligned to 16 bytes; FS_SHARED(int, flag, ) is a scalar.
// The tag tells the arrays of a block apart, those of different instances of a template too.
#define FS_SHARED(type, name, dims)    \
  static char fs_tag_of_##name;        \
  using fs_type_of_##name = type dims; \
  fs_type_of_##name& name =            \
      *reinterpret_cast<fs_type_of_##name*>(::fs::simt::shared_array(&fs_tag_of_##name, sizeof(fs_type_of_##name)))
// FS_DYNAMIC_SHARED(name): unsigned char* name, the shared_bytes of the launch, aligned to 1024 bytes.
#define FS_DYNAMIC_SHARED(name) unsigned char* const name = static_cast<unsigned char*>(::fs::simt::dynamic_shared())

#else

#include "error.h"

#define FS_SHARED(type, name, dims) __shared__ __align__(16) type name dims
#define FS_DYNAMIC_SHARED(name)                                        \
  extern __shared__ __align__(1024) unsigned char fs_dynamic_shared[]; \
  unsigned char* const name = fs_dynamic_shared

#endif

namespace fs {

struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes;  // dynamic
  cudaStream_t stream;
};

template <class... Parameters, class... Args>
void launch(const LaunchConfig& config, void (*kernel)(Parameters...), Args... args) {
#if defined(FS_SIMT)
  // They read the launcher's memory, which is the one place where that is right; inlining moves reads from one to the
  // other.
  auto call = [&]() __attribute__((no_sanitize("thread"))) { kernel(static_cast<Parameters>(args)...); };
  simt::run(
      config.grid, config.block, config.shared_bytes,
      [](void* c) __attribute__((no_sanitize("thread"))) { (*static_cast<decltype(call)*>(c))(); }, &call);
#else
  if (config.shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(config.shared_bytes)),
               "shared memory of a kernel");
  cudaLaunchConfig_t c{};
  c.gridDim = config.grid;
  c.blockDim = config.block;
  c.dynamicSmemBytes = config.shared_bytes;
  c.stream = config.stream;
  check_cuda(cudaLaunchKernelEx(&c, kernel, static_cast<Parameters>(args)...), "launch of a kernel");
#endif
}

}  // namespace fs
