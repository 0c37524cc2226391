// The one header of a .cu file: CUDA (or, with -DFS_SIMT, the names of CUDA for g++), fs::launch, PTX.
// How to write a kernel here, and how it is run and checked without a GPU: docs/cuda-on-cpu.md.
#pragma once
#include <cstdint>

#if defined(FS_SIMT)
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "convert.h"
#include "launch.h"
#include "ptx.h"
