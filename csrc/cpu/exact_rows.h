// Rows that the vector kernels give up on: scaled double precision, whatever the element type.
#pragma once
#include "../weight_norm.h"

namespace wnkernel::cpu {

// Every output of one row. Slow: a few ns per element, three passes.
void exact_row(const Forward& p, int64_t row);
void exact_row(const Backward& p, int64_t row);

}  // namespace wnkernel::cpu
