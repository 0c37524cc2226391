// int8_gemm on CUDA, sm_80 and later: the launchers. Torch-free; pointers are device pointers.
#pragma once
#include <cstdint>

#include "../int8_gemm.h"

namespace fs::int8_gemm::sm80 {

inline constexpr const char* kName = "sm80";
// No hardware has run these kernels yet: they are off unless FASTSPARSE_UNPROVEN=1 (docs/gpu-status.md).
inline constexpr bool kProven = false;

// Bytes of scratch, at a multiple of 16, that linear() needs for m rows of k.
int64_t scratch_bytes(int64_t m, int64_t k);

// As int8_gemm::linear(); args.weight is a vnni16 pack in device memory. `stream` is a cudaStream_t.
void linear(const LinearArgs& args, uint8_t* scratch, void* stream);

// The same for weight_only_linear(): for 1 to 16 rows at a time, right for more. The header of a u4 pack is read by the
// kernels alone.
int64_t weight_only_scratch_bytes(int64_t m, int64_t k);
void weight_only_linear(const WeightOnlyArgs& args, uint8_t* scratch, void* stream);

}  // namespace fs::int8_gemm::sm80
