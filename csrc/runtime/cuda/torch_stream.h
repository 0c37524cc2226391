// What ops.cpp files need to start CUDA kernels from torch: the stream, and the gate before unproven kernels.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../pack.h"

// Weak: a CPU build of torch lacks it, and the library must load there all the same.
#pragma weak aoti_torch_get_current_cuda_stream

namespace fs {

inline void* current_cuda_stream(const torch::stable::Tensor& x) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(static_cast<int32_t>(x.get_device_index()), &stream) != 0)
    throw std::runtime_error("torch gave no CUDA stream for the device of x");
  return stream;
}

// The header of a pack on the device, which has at least as many bytes. A copy: the host waits for the stream, and the
// call can't be captured into a CUDA graph.
inline PackHeader host_header(torch::stable::Tensor pack) {
  const torch::stable::Tensor head = torch::stable::to(torch::stable::narrow(pack, 0, 0, kPackHeaderBytes),
                                                       torch::stable::Device(torch::headeronly::DeviceType::CPU));
  PackHeader header;
  std::memcpy(&header, head.const_data_ptr(), sizeof header);
  return header;
}

// The gate of every op's entry for CUDA, before anything asks torch for a device or a stream: a CPU build of torch has
// neither, and what never ran on hardware is off by default.
inline void check_proven(const char* op, const char* kernel, bool proven) {
  if (&aoti_torch_get_current_cuda_stream == nullptr)
    throw std::runtime_error(std::string(op) + ": this torch is a CPU build, it has no CUDA to run on");
  if (proven) return;
  const char* allowed = std::getenv("FASTSPARSE_UNPROVEN");
  if (allowed == nullptr || std::string(allowed) != "1")
    throw std::runtime_error(std::string(op) + ": its CUDA kernel " + kernel +
                             " has never run on hardware and is off; FASTSPARSE_UNPROVEN=1 turns it on, and "
                             "`fastsparse check --device cuda` holds it against the oracle");
}

}  // namespace fs
