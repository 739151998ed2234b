#include "types.cuh"

WNKERNEL_INSTANCE(f32_f16, float, __half)
