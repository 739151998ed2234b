#include "types.cuh"

WNKERNEL_INSTANCE(f16, __half, __half)
