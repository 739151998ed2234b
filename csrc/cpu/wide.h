// Doubles whose exponent has no bounds. They compute rows whose squares or whose g / norm do not
// fit into a double.
#pragma once
#include <cmath>
#include <cstdlib>

namespace wnkernel::cpu {

// m * 2^e with |m| in [1/2, 1). The exponent of zero is below all others, that of inf and NaN
// above.
struct Wide {
  double m;
  int e;

  Wide(double x, int exponent = 0) {
    constexpr int kBeyond = 1 << 20;
    m = std::frexp(x, &e);
    e = x == 0 ? -kBeyond : std::isfinite(x) ? e + exponent : kBeyond;
  }
  // Rounds once, also to subnormal numbers. The result is inf if x does not fit.
  explicit operator double() const { return std::ldexp(m, e); }
};

inline Wide operator*(Wide a, Wide b) { return {a.m * b.m, a.e + b.e}; }
inline Wide operator/(Wide a, Wide b) { return {a.m / b.m, a.e - b.e}; }
inline Wide operator+(Wide a, Wide b) {
  const int e = a.e > b.e ? a.e : b.e;
  return {std::ldexp(a.m, a.e - e) + std::ldexp(b.m, b.e - e), e};
}
inline Wide operator-(Wide a, Wide b) { return a + Wide(-b.m, b.e); }
// Compares numbers that are not negative; false if the first is NaN.
inline bool operator<(Wide a, Wide b) { return a.e != b.e ? a.e < b.e : a.m < b.m; }

inline Wide root(Wide x) {
  const int odd = x.e & 1;
  return {std::sqrt(std::ldexp(x.m, odd)), (x.e - odd) / 2};
}

// Whether a magnitude is far from both ends of the range of doubles. False for NaN.
inline bool is_usual(double magnitude) { return magnitude >= 0x1p-900 && magnitude <= 0x1p900; }

// A factor for many doubles. If both the factor and a double are usual, their product costs a fifth
// of a Wide product.
struct Factor {
  Wide wide;
  double power;  // 2^e, or 0 if |e| > 900

  explicit Factor(Wide x) : wide(x), power(std::abs(x.e) <= 900 ? std::ldexp(1.0, x.e) : 0.0) {}
  double times(double x) const {
    const bool digits_stay = std::fabs(x) >= 0x1p-900 || x == 0;
    return power != 0 && digits_stay ? x * wide.m * power : static_cast<double>(wide * x);
  }
};

}  // namespace wnkernel::cpu
