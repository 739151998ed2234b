// Computes rows that the vector kernels give up, in scaled double precision, for any element type.
#pragma once
#include "../weight_norm.h"

namespace wnkernel::cpu {

// Computes every output of one row. This is slow: a few ns per element, in three passes.
void exact_row(const Forward& p, int64_t row);
void exact_row(const Backward& p, int64_t row);

}  // namespace wnkernel::cpu
