// From sums to coefficients: what both directions compute once per row.
#pragma once
#include "elements.cuh"
#include "table.h"

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

// x / y for 2^-128 < y < 2^126, in fewer registers, with an error of two units in the last place.
__device__ inline float quick_ratio(float x, float y) { return __fdividef(x, y); }
__device__ inline double quick_ratio(double x, double y) { return x / y; }

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

// eps as it is compared with norms, or, if it is negative, taken from them: it is at least the
// smallest number, unless it is 0.
template <class Sum>
__device__ inline Sum nonzero_bound(double eps) {
  const Sum bound = static_cast<Sum>(eps);
  if (bound != 0 || eps == 0) return bound;
  return eps > 0 ? Range<Sum>::kLeast : -Range<Sum>::kLeast;
}

// n = max(norm, eps), or norm - eps if eps is negative.
template <class Sum>
__device__ inline Sum bounded(Sum norm, Sum bound) {
  return norm < bound ? bound : norm - (bound < 0 ? bound : Sum(0));
}

// n * power, from norm * power, if n or 1 / n is no normal number.
template <class Sum>
__device__ inline Sum bounded_times(Sum power, Sum norm, double eps, bool clamped) {
  if (clamped) return static_cast<Sum>(eps * power);
  return eps < 0 ? norm - static_cast<Sum>(eps * power) : norm;
}

// g / n, as two factors that multiply v one after the other. The norm is rounded to divisor_type
// first and bounded then. Usually the factors are the ratio and 1. If the ratio is no normal
// number, they are 1 / n and g. If not even n is normal, they are a power of two and the rest. Zero
// rows give zeros if eps is not 0, whatever it is.
template <class Sum>
struct Forwards {
  Sum norm, a, b;

  // squares is a sum of squares of unit * v.
  __device__ static Forwards of(Sum squares, Sum unit, Sum g, double eps, DType divisor_type) {
    using R = Range<Sum>;
    const Sum scaled = root(squares), bound = nonzero_bound<Sum>(eps);
    const Sum norm = unit == 1 ? scaled : scaled / unit;
    const bool clamped = norm < bound;
    const Sum n = bounded(divisor(norm, divisor_type), bound), ratio = g / n;
    if (is_normal(n)) {
      if (is_normal(ratio)) return {norm, ratio, 1};
      if (is_normal(1 / n)) return {norm, 1 / n, g};
    }
    if (norm == 0 && bound != 0) return {norm, 0, g};
    const Sum power = n < 1 ? 1 / R::kSmallest : R::kDown;
    const Sum rest = bounded_times(power, scaled * (power / unit), eps, clamped);
    return {norm, power, g / rest};
  }

  // Of the new v, forced * v / n. Its norm is that of the old one.
  __device__ static Forwards of_v(Sum squares, Sum unit, const ForwardLine& line) {
    return of(squares, unit, static_cast<Sum>(line.forced), line.eps, kType<Sum>);
  }

  // Of w, and the norm that v has in the end. If v is replaced, w is computed from the old v, and g
  // becomes g * forced / n of the new norm. That is g itself if the new norm is `forced` and larger
  // than a bound.
  __device__ static Forwards of(Sum squares, Sum unit, Sum g, const ForwardLine& line) {
    DType divisor_type = line.divisor_type;
    Sum norm = 0;
    if (line.forced > 0) {
      const Sum forced = static_cast<Sum>(line.forced), bound = nonzero_bound<Sum>(line.eps);
      const Sum scaled = root(squares);
      const Sum n = bounded_times(unit, scaled, line.eps, scaled < bound * unit);
      if (scaled != 0) {
        norm = forced * (scaled / n);
        g *= forced / bounded(divisor(norm, divisor_type), bound);
      }
      divisor_type = kType<Sum>;
    }
    Forwards f = of(squares, unit, g, line.eps, divisor_type);
    if (line.forced > 0) f.norm = norm;
    return f;
  }
};

// n of a backward, and its inverse.
template <class Sum>
struct Divisor {
  Sum n, inverse;
  bool clamped;

  __device__ static Divisor of(Sum norm, double eps) {
    const Sum bound = nonzero_bound<Sum>(eps), n = bounded(norm, bound);
    return {n, 1 / n, norm < bound};
  }

  // Whether n, 1 / n and g / n can be used in computations directly.
  __device__ bool is_usual() const { return is_normal(n) && is_normal(inverse); }
  __device__ bool is_usual_under(Sum g) const {
    return is_usual() && (is_normal(g * inverse) || g == 0);
  }
};

// s n / norm of a row if eps is negative, else s. It is 0 for rows so short that n / norm leaves
// the range. The norm is loaded again, because no registers are left to hold it.
template <bool Quick, class Sum>
__device__ inline Sum along_added(Sum s, const BackwardLine& line, int64_t row) {
  if (!(static_cast<Sum>(line.eps) < 0)) return s;
  const Sum norm = __ldg(static_cast<const Sum*>(line.norm) + row);
  const Sum n = bounded(norm, nonzero_bound<Sum>(line.eps));
  const Sum ratio = Quick ? quick_ratio(n, norm) : n / norm, share = n == norm ? Sum(1) : ratio;
  return share <= Range<Sum>::kLargest ? s * share : Sum(0);
}

// With u = v / n and s = <grad_w, u>: grad_v = (g / n) (grad_w - u s), and without the projection
// if norm < eps. Usually `inverse` is 1 / n and `rest` is 1. If n or 1 / n is no normal number,
// `inverse` is a power of two and 1 / n = inverse / rest, so that v * inverse = rest * u. For a
// negative eps, along_added() comes between s and along().
template <class Sum>
struct Backwards {
  Sum inverse, rest;
  bool clamped;

  __device__ static Backwards of(Sum norm, double eps) {
    using R = Range<Sum>;
    const auto d = Divisor<Sum>::of(norm, eps);
    if (d.is_usual()) return {d.inverse, 1, d.clamped};
    const Sum power = d.n < 1 ? 1 / R::kSmallest : R::kSmallest;
    const Sum rest = bounded_times(power, norm * power, eps, d.clamped);
    const bool is_least = eps != 0 && rest < R::kSmallest;  // such bounds count as larger ones
    return {power, is_least ? R::kSmallest : rest, d.clamped};
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
