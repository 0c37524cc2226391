// qdq on CUDA, sm_80 and later: the launchers, the same as those of cpu/launch.cpp (../qdq.h) behind a stream. All
// pointers are device pointers, those to scale and zero_point too: their values can't be checked before the launch, so
// a scale that is no positive number gives codes that mean nothing (and touches nothing outside). Torch-free.
#pragma once
#include <cstdint>

#include "../qdq.h"

namespace fs::qdq::sm80 {

inline constexpr const char* kName = "sm80";
// No hardware has run these kernels yet: they are off unless FASTSPARSE_UNPROVEN=1 (docs/gpu-status.md).
inline constexpr bool kProven = false;

// `stream` is a cudaStream_t. args.stream (the way of storing) is not read.
void quantize_per_token(const TokenArgs& args, void* stream);
void quantize(const void* x, DType dtype, const Parameters& p, int8_t* codes, void* stream);
void dequantize(const int8_t* codes, const Parameters& p, void* y, DType dtype, void* stream);
// mask: null, or [rows, mask_bytes(length)] of rows_of(p.shape).
void fake_quantize(const void* x, DType dtype, const Parameters& p, int32_t lowest, int32_t highest, void* y,
                   uint8_t* mask, void* stream);
void fake_quantize_grad(const void* grad, DType dtype, int64_t rows, int64_t length, const uint8_t* mask, void* grad_x,
                        void* stream);

}  // namespace fs::qdq::sm80
