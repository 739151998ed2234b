#include "types.cuh"

WNKERNEL_INSTANCE(bf16, __nv_bfloat16, __nv_bfloat16)
