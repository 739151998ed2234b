#include "types.cuh"

WNKERNEL_INSTANCE(f32, float, float)
