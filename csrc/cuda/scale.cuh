// From sums to coefficients: what both directions compute once per row.
#pragma once
#include "elements.cuh"

namespace wnkernel::cuda {

template <class T>
struct Range;
template <>
struct Range<float> {
  static constexpr float kSmallest = 0x1p-126f, kLargest = 0x1.fffffep127f;  // normal numbers
  static constexpr float kLeast = 0x1p-149f;
  static constexpr float kLow = 0x1p-80f, kHigh = 0x1p100f;  // sums of squares that lost nothing
  static constexpr float kUp = 0x1p90f, kDown = 0x1p-86f;
};
template <>
struct Range<double> {
  static constexpr double kSmallest = 0x1p-1022, kLargest = 0x1.fffffffffffffp1023;
  static constexpr double kLeast = 0x1p-1074;
  static constexpr double kLow = 0x1p-800, kHigh = 0x1p900;
  static constexpr double kUp = 0x1p700, kDown = 0x1p-600;
};

__device__ inline float root(float x) { return __fsqrt_rn(x); }
__device__ inline double root(double x) { return __dsqrt_rn(x); }

// The power of two that multiplies a row before it is squared. It is 1 unless the sum of squares
// left the safe range.
template <class Sum>
__device__ inline Sum unit_of(Sum squares) {
  using R = Range<Sum>;
  return squares > R::kHigh ? R::kDown : squares < R::kLow ? R::kUp : Sum(1);
}

template <class Sum>
__device__ inline bool is_normal(Sum x) {
  const Sum size = x < 0 ? -x : x;
  return size >= Range<Sum>::kSmallest && size <= Range<Sum>::kLargest;
}

// The norm rounded to a half type, or the norm itself for other types and if the rounded value is
// no normal number.
__device__ inline float divisor(float norm, DType type) {
  if (type != DType::f16 && type != DType::bf16) return norm;
  const bool is_f16 = type == DType::f16;
  const float held = is_f16 ? widen(narrow<__half>(norm)) : widen(narrow<__nv_bfloat16>(norm));
  const float smallest = is_f16 ? 0x1p-14f : 0x1p-126f;
  const float largest = is_f16 ? 65504.0f : 0x1.fep127f;
  return held >= smallest && held <= largest ? held : norm;
}
__device__ inline double divisor(double norm, DType) { return norm; }

// eps as it is compared with norms: positive bounds are at least the smallest positive number.
template <class Sum>
__device__ inline Sum nonzero_bound(double eps) {
  const Sum bound = static_cast<Sum>(eps);
  return bound == 0 && eps > 0 ? Range<Sum>::kLeast : bound;
}

// g / max(norm, eps), as two factors that multiply v one after the other. The norm is rounded to
// divisor_type first and bounded then. Usually the factors are the ratio and 1. If the ratio is no
// normal number, they are 1 / max(norm, eps) and g. If not even the norm is normal, they are a
// power of two and the rest. Zero rows below a bound give zeros, whatever the bound is.
template <class Sum>
struct Forwards {
  Sum norm, a, b;

  // squares is a sum of squares of unit * v.
  __device__ static Forwards of(Sum squares, Sum unit, Sum g, double eps, DType divisor_type) {
    using R = Range<Sum>;
    const Sum scaled = root(squares), bound = nonzero_bound<Sum>(eps);
    const Sum norm = unit == 1 ? scaled : scaled / unit;
    const bool clamped = norm < bound;
    const Sum held = divisor(norm, divisor_type), n = held < bound ? bound : held, ratio = g / n;
    if (is_normal(n)) {
      if (is_normal(ratio)) return {norm, ratio, 1};
      if (is_normal(1 / n)) return {norm, 1 / n, g};
    }
    if (clamped && norm == 0) return {norm, 0, g};
    const Sum power = n < 1 ? 1 / R::kSmallest : R::kDown;
    const Sum rest = clamped ? static_cast<Sum>(eps * power) : scaled * (power / unit);
    return {norm, power, g / rest};
  }
};

// n = max(norm, eps) of a backward, and its inverse.
template <class Sum>
struct Divisor {
  Sum n, inverse;
  bool clamped;

  __device__ static Divisor of(Sum norm, double eps) {
    const Sum bound = nonzero_bound<Sum>(eps);
    const bool clamped = norm < bound;
    const Sum n = clamped ? bound : norm;
    return {n, 1 / n, clamped};
  }

  // Whether n, 1 / n and g / n can be used in computations directly.
  __device__ bool is_usual() const { return is_normal(n) && is_normal(inverse); }
  __device__ bool is_usual_under(Sum g) const {
    return is_usual() && (is_normal(g * inverse) || g == 0);
  }
};

// With n = max(norm, eps), u = v / n and s = <grad_w, u>: grad_v = (g / n) (grad_w - u s), and
// without the projection if norm < eps. Usually `inverse` is 1 / n and `rest` is 1. If n or 1 / n
// is no normal number, `inverse` is a power of two and 1 / n = inverse / rest, so that v * inverse
// = rest * u.
template <class Sum>
struct Backwards {
  Sum inverse, rest;
  bool clamped;

  __device__ static Backwards of(Sum norm, double eps) {
    using R = Range<Sum>;
    const auto d = Divisor<Sum>::of(norm, eps);
    if (d.is_usual()) return {d.inverse, 1, d.clamped};
    const Sum power = d.n < 1 ? 1 / R::kSmallest : R::kSmallest;
    const Sum scaled = static_cast<Sum>(eps * power);  // the least bounds count as larger ones
    const Sum of_bound = scaled < R::kSmallest ? R::kSmallest : scaled;
    return {power, d.clamped ? of_bound : norm * power, d.clamped};
  }

  // Computes s from <grad_w, v * inverse>.
  __device__ Sum dot(Sum sum) const { return rest == 1 ? sum : sum / rest; }
  // The factor of v * inverse that gives u s.
  __device__ Sum along(Sum s) const { return clamped ? 0 : dot(s); }

  // g / n as two factors that multiply one after the other: the ratio and 1, or, if the ratio is no
  // normal number, a power of two and the rest.
  struct Ratio {
    Sum a, b;
  };
  __device__ Ratio ratio(Sum g) const {
    using R = Range<Sum>;
    const Sum ratio = rest == 1 ? g * inverse : g / rest * inverse;
    if (is_normal(ratio) || g == 0) return {ratio, 1};
    if (rest != 1) return {inverse, g / rest};
    const Sum power = ratio < 1 && ratio > -1 ? R::kSmallest : 1 / R::kSmallest;
    return {power, g / power * inverse};
  }
};

}  // namespace wnkernel::cuda
