// Launches for each pair of types that kernels are compiled for.
#pragma once
#include "../weight_norm.h"

namespace wnkernel::cuda {

// Calls WNKERNEL_PAIR(name, type of v, type of w) for each of them. Other pairs go by one of these,
// see csrc/ops_cuda.cpp.
#define WNKERNEL_PAIRS(WNKERNEL_PAIR) \
  WNKERNEL_PAIR(f32, f32, f32)        \
  WNKERNEL_PAIR(f16, f16, f16)        \
  WNKERNEL_PAIR(bf16, bf16, bf16)     \
  WNKERNEL_PAIR(f32_f16, f32, f16)    \
  WNKERNEL_PAIR(f32_bf16, f32, bf16)  \
  WNKERNEL_PAIR(f64, f64, f64)

// Problems of one pair. The first CUDA error, 0 if there was none.
#define WNKERNEL_DECLARE(name, v, w)                                                    \
  int forward_##name(const Forward* const* problems, int64_t count, const CudaLaunch&); \
  int backward_##name(const Backward* const* problems, int64_t count, const CudaLaunch&);
WNKERNEL_PAIRS(WNKERNEL_DECLARE)
#undef WNKERNEL_DECLARE

}  // namespace wnkernel::cuda
