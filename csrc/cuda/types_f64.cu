#include "types.cuh"

WNKERNEL_INSTANCE(f64, double, double)
