// The functions that an instruction set provides: reductions and maps over the rows or the strip of
// one chunk, for each pair of element types in WNKERNEL_CPU_PAIRS. driver.cpp cuts the chunks and
// fixes their order.
//
// y is v. x is multiplied with y: x is v in the forward and grad_w in the backward. A is the
// accumulation type: double if v is f64, float otherwise.
#pragma once
#include "../weight_norm.h"

namespace wnkernel::cpu {

struct Kernels {
  // sums[r] += <x[r, :], y[r, :]> for `rows` adjacent rows of length n.
  void (*dot_rows)(const void* x, const void* y, int64_t rows, int64_t n, double* sums);
  // sums[c] += <x[:, c], y[:, c]> for `outer` rows of memory, which are `stride` elements apart.
  // sums has type A.
  void (*dot_columns)(const void* x, const void* y, int64_t outer, int64_t stride, int64_t columns,
                      void* sums);
  // The forward computes out[r, :] = a[r] y[r, :], where out may be y, the backward out[r, :] =
  // a[r] x[r, :] - b[r] y[r, :]. a and b have type A. With `stream`, results bypass the caches,
  // which could not hold them until they are read again.
  void (*map_rows)(const void* x, const void* y, void* out, int64_t rows, int64_t n, const void* a,
                   const void* b, bool stream);
  // Does the same with a and b per column.
  void (*map_columns)(const void* x, const void* y, void* out, int64_t outer, int64_t stride,
                      int64_t columns, const void* a, const void* b, bool stream);
};

// From sums to the coefficients of the map. The result counts rows that leave SafeRange. Their sum
// is set to NaN, and exact_rows.h computes them again. Until then a forward copies them, because w
// may be v.
struct Finish {
  // sums are sums of squares. Sets norm[r] and a[r] = g[r] / max(norm[r], eps). The norm is rounded
  // to A first, or, with `as_g`, to the type of g. With forced > 0 it also sets b[r], the factor of
  // the new v, and norm[r] and a[r] * b[r] belong to that.
  int64_t (*forward)(double* sums, const void* g, int64_t rows, double eps, bool as_g,
                     double forced, void* norm, void* a, void* b);
  // sums are <grad_w, v>. Sets grad_g[r] (unless grad_g is null) and both coefficients.
  int64_t (*backward)(double* sums, const void* g, const void* norm, int64_t rows, double eps,
                      void* grad_g, void* a, void* b);
};

struct InstructionSet {
  const char* name;
  Kernels forward[4][4];   // [v_type][w_type] of WNKERNEL_CPU_PAIRS; null for other pairs
  Kernels backward[4][4];  // [v_type][w_type], likewise
  Finish finish[2][4];     // [whether A is double][g_type]
};

extern const InstructionSet kBaseline;  // what every processor of the platform has: SSE2, NEON, ...
#if defined(__x86_64__)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
#endif

// The range in which A represents squares, dot products and coefficients without overflow or lost
// digits, for rows of any length that fits into memory. A dot product of exactly 0 is common: the
// row has no gradient. But below kZeroDotNormMin the products may have underflowed one by one.
template <class A>
struct SafeRange;
template <>
struct SafeRange<float> {
  static constexpr double kNormMin = 0x1p-50, kNormMax = 0x1p60, kZeroDotNormMin = 0x1p-20;
  static constexpr double kDotMin = 0x1p-100, kDotMax = 0x1p120;
  static constexpr double kCoefficientMin = 0x1p-120, kCoefficientMax = 0x1p120;
};
template <>
struct SafeRange<double> {
  static constexpr double kNormMin = 0x1p-400, kNormMax = 0x1p480, kZeroDotNormMin = 0x1p-100;
  static constexpr double kDotMin = 0x1p-900, kDotMax = 0x1p1000;
  static constexpr double kCoefficientMin = 0x1p-1000, kCoefficientMax = 0x1p1000;
};

}  // namespace wnkernel::cpu
