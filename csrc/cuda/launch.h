// Launches for each pair of types that kernels are compiled for.
#pragma once
#include "../weight_norm.h"

namespace wnkernel::cuda {

// Problems of one pair. The first CUDA error, 0 if there was none.
#define WNKERNEL_DECLARE(name, v, w)                                                    \
  int forward_##name(const Forward* const* problems, int64_t count, const CudaLaunch&); \
  int backward_##name(const Backward* const* problems, int64_t count, const CudaLaunch&);
WNKERNEL_PAIRS(WNKERNEL_DECLARE)
#undef WNKERNEL_DECLARE

}  // namespace wnkernel::cuda
