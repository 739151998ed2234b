// What an instruction set provides: reductions and maps over the rows or the strip of one chunk,
// for each pair of element types of WNKERNEL_CPU_PAIRS. driver.cpp cuts the chunks and owns their
// order.
//
// y is v. x is what is multiplied with it: v again in the forward, grad_w in the backward. A is the
// accumulation type: double where v is f64, float otherwise.
#pragma once
#include "../weight_norm.h"

namespace wnkernel::cpu {

struct Kernels {
  // sums[r] += <x[r, :], y[r, :]> for `rows` adjacent rows of length n.
  void (*dot_rows)(const void* x, const void* y, int64_t rows, int64_t n, double* sums);
  // sums[c] += <x[:, c], y[:, c]> for `outer` rows of memory, `stride` elements apart; sums: A.
  void (*dot_columns)(const void* x, const void* y, int64_t outer, int64_t stride, int64_t columns,
                      void* sums);
  // stream: past the caches, for results too large to be found there later.
  // Forward: out[r, :] = a[r] y[r, :]. Backward: out[r, :] = a[r] x[r, :] - b[r] y[r, :]. a, b: A.
  void (*map_rows)(const void* x, const void* y, void* out, int64_t rows, int64_t n, const void* a,
                   const void* b, bool stream);
  // The same with a and b per column.
  void (*map_columns)(const void* x, const void* y, void* out, int64_t outer, int64_t stride,
                      int64_t columns, const void* a, const void* b, bool stream);
};

// From sums to the coefficients of the map. Rows that a float cannot hold (see SafeRange) are
// counted in the result, and their sum is set to NaN: exact_rows.h does them again.
struct Finish {
  // sums: of squares. norm[r] and a[r] = g[r] / max(norm[r], eps), with the norm rounded to A, or,
  // `as_g`, to the type of g.
  int64_t (*forward)(double* sums, const void* g, int64_t rows, double eps, bool as_g, void* norm,
                     void* a);
  // sums: <grad_w, v>. grad_g[r] (unless null) and both coefficients.
  int64_t (*backward)(double* sums, const void* g, const void* norm, int64_t rows, double eps,
                      void* grad_g, void* a, void* b);
};

struct InstructionSet {
  const char* name;
  Kernels forward[4][4];   // [v_type][w_type], of WNKERNEL_CPU_PAIRS; null for others
  Kernels backward[4][4];  // the same
  Finish finish[2][4];     // [whether A is double][g_type]
};

extern const InstructionSet kBaseline;  // what the compiler assumes anyway: SSE2, NEON, ...
#if defined(__x86_64__)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
#endif

// Where A carries squares, dot products and coefficients without overflow or lost digits, at any
// row length that fits in memory. A dot product of exactly 0 is a row without a gradient, which is
// common, unless the norm is so small that the products may have vanished one by one.
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
