#include "types.cuh"

WNKERNEL_INSTANCE(f32_bf16, float, __nv_bfloat16)
