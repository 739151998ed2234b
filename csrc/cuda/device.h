// What kernels need of CUDA. It comes from the CUDA compiler, or from the host SIMT shim in
// tests/simt, which runs the same sources on a CPU.
#pragma once

#if defined(WNKERNEL_SIMT)
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define WNKERNEL_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#define WNKERNEL_SHARED(type, name) __shared__ type name
#endif
