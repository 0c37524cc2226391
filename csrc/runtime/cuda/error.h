// CUDA errors as exceptions: a library never prints, exits or aborts.
#pragma once
#include <stdexcept>
#include <string>

namespace fs {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": CUDA error: " + cudaGetErrorString(error));
}

}  // namespace fs
