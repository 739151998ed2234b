// Instantiates the kernels and their launches for one pair of types.
#pragma once
#include "launch.cuh"

#define WNKERNEL_INSTANCE(name, V, W)                                                         \
  namespace wnkernel::cuda {                                                                  \
  int forward_##name(const Forward* const* problems, int64_t count, const CudaLaunch& on) {   \
    return launch_all<V, W>(problems, count, on);                                             \
  }                                                                                           \
  int backward_##name(const Backward* const* problems, int64_t count, const CudaLaunch& on) { \
    return launch_all<V, W>(problems, count, on);                                             \
  }                                                                                           \
  }
