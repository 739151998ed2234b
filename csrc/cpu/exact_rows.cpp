// w = g (v / n): v and grad_w are divided by a power of two near their largest element first, so
// that no square overflows or loses digits; what was divided out goes back in at the end.
#include "exact_rows.h"

#include <algorithm>
#include <cmath>

#include "elements.h"

namespace wnkernel::cpu {
namespace {

template <class F>
auto visit(DType t, F&& f) {
  switch (t) {
    case DType::f16:
      return f(f16{});
    case DType::bf16:
      return f(bf16{});
    case DType::f32:
      return f(float{});
    default:
      return f(double{});
  }
}

double element(const void* p, DType t, int64_t k) {
  return visit(t, [&](auto tag) { return to_double(static_cast<const decltype(tag)*>(p)[k]); });
}

void set_element(void* p, DType t, int64_t k, double x) {
  visit(t, [&](auto tag) { from_double(x, static_cast<decltype(tag)*>(p) + k); });
}

double rounded_to(DType t, double x) {
  return visit(t, [&](auto tag) { return rounded<decltype(tag)>(x); });
}

// f(k) for the index k of every element of a row, in memory order.
template <class F>
void for_row(const RowView& view, int64_t row, F&& f) {
  for (int64_t o = 0; o < view.outer; ++o) {
    const int64_t start = (o * view.rows + row) * view.inner;
    for (int64_t k = start; k < start + view.inner; ++k) f(k);
  }
}

// Multiplication by 2^exponent over the whole range of double exponents, without ldexp's cost.
struct PowerOfTwo {
  double half, rest;
  explicit PowerOfTwo(int exponent)
      : half(std::ldexp(1.0, exponent / 2)), rest(std::ldexp(1.0, exponent - exponent / 2)) {}
  double operator*(double x) const { return x * half * rest; }
};

// A row of p as x * 2^exponent with |x| <= 1; x is taken as it is if it holds an inf or a NaN.
struct ScaledRow {
  const void* p;
  DType type;
  double largest = 0;
  int exponent = 0;
  PowerOfTwo down{0};

  ScaledRow(const void* p, DType type, const RowView& view, int64_t row) : p(p), type(type) {
    for_row(view, row, [&](int64_t k) {
      const double x = std::fabs(element(p, type, k));
      if (!(x <= largest)) largest = std::isnan(largest) ? largest : x;
    });
    if (largest > 0 && std::isfinite(largest)) std::frexp(largest, &exponent);
    down = PowerOfTwo(-exponent);
  }
  double operator[](int64_t k) const { return down * element(p, type, k); }
};

double norm_of(const ScaledRow& v, const RowView& view, int64_t row) {
  double squares = 0;
  for_row(view, row, [&](int64_t k) { squares += v[k] * v[k]; });
  return std::sqrt(squares);
}

}  // namespace

void exact_row(const Forward& p, int64_t row) {
  const ScaledRow v(p.v, p.v_type, p.view, row);
  if (v.largest == 0) {
    const double zero = p.eps > 0 ? 0.0 : std::nan("");
    set_element(p.norm, accumulation(p.v_type), row, 0.0);
    for_row(p.view, row, [&](int64_t k) { set_element(p.w, p.w_type, k, zero); });
    return;
  }
  const double norm = norm_of(v, p.view, row);
  const double whole = std::ldexp(norm, v.exponent), held = rounded_to(p.divisor_type, whole);
  const double n = held == whole ? norm : std::ldexp(held, -v.exponent);
  const double eps = rounded_to(accumulation(p.v_type), p.eps);
  const double divisor = std::max(n, std::ldexp(eps, -v.exponent));
  const double g = element(p.g, p.g_type, row);
  set_element(p.norm, accumulation(p.v_type), row, whole);
  for_row(p.view, row, [&](int64_t k) { set_element(p.w, p.w_type, k, g * (v[k] / divisor)); });
}

void exact_row(const Backward& p, int64_t row) {
  const ScaledRow v(p.v, p.v_type, p.view, row), grad_w(p.grad_w, p.w_type, p.view, row);
  const double norm = norm_of(v, p.view, row);
  const double eps = std::ldexp(rounded_to(accumulation(p.v_type), p.eps), -v.exponent);
  const double divisor = std::max(norm, eps), g = element(p.g, p.g_type, row);
  const bool clamped = norm < eps;
  double projection = 0;
  for_row(p.view, row, [&](int64_t k) { projection += grad_w[k] * (v[k] / divisor); });
  if (p.grad_g) set_element(p.grad_g, p.g_type, row, std::ldexp(projection, grad_w.exponent));
  if (!p.grad_v) return;
  const PowerOfTwo up(grad_w.exponent - v.exponent);
  for_row(p.view, row, [&](int64_t k) {
    const double across = grad_w[k] - (clamped ? 0.0 : v[k] / divisor * projection);
    set_element(p.grad_v, p.v_type, k, up * (g * (across / divisor)));
  });
}

}  // namespace wnkernel::cpu
