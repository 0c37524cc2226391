// fs::launch: the only way a kernel of ours is started. Shared memory only through FS_SHARED.
#pragma once
#include <cuda_runtime.h>

#include "error.h"

// A shared array: FS_SHARED(int, tile, [8][64]);
#define FS_SHARED(type, name, dims) __shared__ type name dims

namespace fs {

struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Args>
void launch(const LaunchConfig& config, void (*kernel)(Parameters...), Args... args) {
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
}

}  // namespace fs
