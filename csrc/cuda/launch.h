// The launches for each pair of types that kernels are compiled for.
#pragma once
#include "../weight_norm.h"

namespace wnkernel::cuda {

// Each launches problems of one pair, and returns the first CUDA error, or 0.
#define WNKERNEL_DECLARE(name, v, w)                                                    \
  int forward_##name(const Forward* const* problems, int64_t count, const CudaLaunch&); \
  int backward_##name(const Backward* const* problems, int64_t count, const CudaLaunch&);
WNKERNEL_PAIRS(WNKERNEL_DECLARE)
#undef WNKERNEL_DECLARE

}  // namespace wnkernel::cuda
