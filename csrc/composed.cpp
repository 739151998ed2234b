#include "composed.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <cmath>
#include <tuple>
#include <utility>

#include "problem.h"

namespace wnkernel::composed {
namespace {

// The norm rounded to a half type, or the norm itself if the rounded value is no normal number.
at::Tensor held(const at::Tensor& norm, at::ScalarType type) {
  const auto [smallest, largest] =
      type == at::kHalf ? std::pair(0x1p-14, 65504.0) : std::pair(0x1p-126, 0x1.fep127);
  const at::Tensor rounded = norm.to(type).to(norm.scalar_type());
  return at::where((rounded >= smallest).logical_and(rounded <= largest), rounded, norm);
}

// eps for computations in a type: 0, or at least the smallest normal number of the type.
double bound_of(double eps, at::ScalarType acc) {
  const double smallest = acc == at::kDouble ? 0x1p-1022 : 0x1p-126;
  return eps > 0.0 && eps < smallest ? smallest : eps;
}

// One weight norm in the accumulation dtype: v and g are cast, the norm is clamped, or something is
// added to it.
struct Terms {
  std::vector<int64_t> dims;  // the dims that a norm sums over
  at::ScalarType acc;
  double eps;
  at::Tensor v, g, divisor;  // divisor is max(norm, eps), or norm - eps if eps is negative
  at::Tensor clamped;        // rows whose divisor is constant; undefined if eps is 0
  at::Tensor share;          // norm / divisor; undefined unless eps is negative

  Terms(const at::Tensor& v_, const at::Tensor& g_, int64_t dim, double eps_)
      : acc(accumulation_dtype(v_.scalar_type())),
        eps(bound_of(eps_, acc)),
        v(v_.to(acc)),
        g(g_.to(acc)) {
    dim = canonical_dim(dim, v.dim());
    for (int64_t k = 0; k < v.dim(); ++k)
      if (k != dim) dims.push_back(k);
    if (eps == 0.0) {
      divisor = norm(v);
      return;
    }
    // Clamped rows are replaced before the norm, because its derivative at a zero row is 0/0.
    const at::Tensor exact = norm(v.detach());
    clamped = eps < 0 ? exact == 0 : exact < eps;
    const at::Tensor safe = norm(at::where(clamped, at::ones({}, v.options()), v));
    divisor =
        at::where(clamped, at::full({}, std::abs(eps), v.options()), eps < 0 ? safe - eps : safe);
    if (eps < 0) share = safe / divisor;
  }

  at::Tensor inverse() const { return divisor.reciprocal(); }

  // The divisor from the norm rounded to a type and then clamped. It only adds a constant to
  // divisor, so that the derivatives stay the same.
  at::Tensor divisor_as(at::ScalarType type) const {
    if (type == acc) return divisor;
    const at::Tensor exact = divisor.detach();
    at::Tensor n = held(clamped.defined() ? norm(v.detach()) : exact, type);
    if (clamped.defined()) n = eps < 0 ? n - eps : n.clamp_min(eps);
    return divisor + (n - exact).masked_fill(n == exact, 0.0);
  }

  at::Tensor row_sum(const at::Tensor& x) const {
    return dims.empty() ? x : x.sum(dims, true).reshape_symint(g.sym_sizes());
  }

  at::Tensor norm(const at::Tensor& x) const {
    if (dims.empty()) return x.abs();
    if (x.sym_numel() == 0) return row_sum(x);
    at::Tensor scale = x.detach().abs().amax(dims, true);
    scale = at::where((scale > 0).logical_and(scale.isfinite()), scale, at::ones({}, x.options()));
    const at::Tensor squares = (x / scale).square().sum(dims, true), is_zero = squares == 0;
    const at::Tensor root = squares.masked_fill(is_zero, 1.0).sqrt();
    return (root.masked_fill(is_zero, 0.0) * scale).reshape_symint(g.sym_sizes());
  }

  // v / norm where the norm is differentiated, v / divisor elsewhere.
  at::Tensor direction() const {
    const at::Tensor u = v * inverse();
    return share.defined() ? u / at::where(clamped, at::ones({}, v.options()), share) : u;
  }
  // x times norm / divisor.
  at::Tensor shared(const at::Tensor& x) const { return share.defined() ? x * share : x; }

  // x where the norm is differentiated, 0 where the divisor is constant.
  at::Tensor unclamped(const at::Tensor& x) const {
    return clamped.defined() ? x.masked_fill(clamped, 0.0) : x;
  }
};

}  // namespace

at::Tensor weight_norm(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                       std::optional<at::ScalarType> out_dtype, Bucket) {
  check_forward(v, g, dim, eps, out_dtype);
  const Terms t(v, g, dim, eps);
  return (t.v * (t.g / t.divisor_as(divisor_dtype(v, g)))).to(out_dtype.value_or(v.scalar_type()));
}

TensorPair forward_one(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                       std::optional<at::ScalarType> out_dtype, Bucket) {
  at::Tensor w = weight_norm(v, g, dim, eps, out_dtype);
  const Terms t(v.detach(), g.detach(), dim, 0.0);
  return {std::move(w), t.norm(t.v)};
}

TensorPair backward_one(const at::Tensor& grad_w, const at::Tensor& v, const at::Tensor& g,
                        const at::Tensor& norm, int64_t dim, double eps, bool need_v, bool need_g,
                        Bucket) {
  check_backward(grad_w, v, g, norm, dim, eps);
  const Terms t(v, g, dim, eps);
  const at::Tensor dw = grad_w.to(t.acc), inverse = t.inverse(), u = t.v * inverse,
                   s = t.row_sum(dw * u);
  at::Tensor grad_v, grad_g;
  if (need_v) {
    const at::Tensor along = t.share.defined() ? s / t.share : s;
    grad_v = ((t.g * inverse) * (dw - u * t.unclamped(along))).to(v.scalar_type());
  }
  if (need_g) grad_g = s.to(g.scalar_type());
  return {need_v ? std::move(grad_v) : not_wanted(v), need_g ? std::move(grad_g) : not_wanted(g)};
}

Tensors forward(at::TensorList v, at::TensorList g, at::IntArrayRef dim, at::ArrayRef<double> eps,
                std::optional<at::ScalarType> out_dtype) {
  check_forward_lengths(v, g, dim, eps);
  const size_t count = v.size();
  Tensors results(2 * count);
  for (size_t k = 0; k < count; ++k)
    std::tie(results[k], results[count + k]) = forward_one(v[k], g[k], dim[k], eps[k], out_dtype);
  return results;
}

Tensors backward(at::TensorList grad_w, at::TensorList v, at::TensorList g, at::TensorList norm,
                 at::IntArrayRef dim, at::ArrayRef<double> eps, at::IntArrayRef need_v,
                 at::IntArrayRef need_g) {
  check_backward_lengths(grad_w, v, g, norm, dim, eps, need_v, need_g);
  Tensors grads, grads_g;
  for (size_t k = 0; k < v.size(); ++k) {
    auto [grad_v, grad_g] =
        backward_one(grad_w[k], v[k], g[k], norm[k], dim[k], eps[k], need_v[k], need_g[k]);
    if (need_v[k]) grads.push_back(std::move(grad_v));
    if (need_g[k]) grads_g.push_back(std::move(grad_g));
  }
  grads.insert(grads.end(), grads_g.begin(), grads_g.end());
  return grads;
}

std::array<at::Tensor, 3> double_backward(const at::Tensor& grad_w, const at::Tensor& v,
                                          const at::Tensor& g, const at::Tensor& gg_v_,
                                          const at::Tensor& gg_g_, int64_t dim, double eps) {
  const Terms t(v, g, dim, eps);
  const at::Tensor dw = grad_w.to(t.acc), inverse = t.inverse(), u = t.direction(),
                   c = t.g * inverse;
  const at::Tensor gg_v = gg_v_.defined() ? gg_v_.to(t.acc) : at::zeros_like(t.v);
  const at::Tensor gg_g = gg_g_.defined() ? gg_g_.to(t.acc) : at::zeros_like(t.g);
  const at::Tensor a = t.unclamped(t.row_sum(gg_v * u)), s = t.unclamped(t.row_sum(dw * u));
  const at::Tensor across_v = gg_v - u * a, across_w = dw - u * s;
  const at::Tensor product = t.row_sum(gg_v * dw), along = product - t.shared(a * s);
  const at::Tensor of_norm = t.share.defined() ? along + (1 - t.share) * (a * s) : along;
  const at::Tensor through_norm = t.unclamped(of_norm * u + s * across_v + a * across_w);
  const at::Tensor d_v = inverse * (gg_g * (dw - u * t.shared(s)) - c * through_norm);
  const at::Tensor d_grad_w = c * (gg_v - u * t.shared(a)) + gg_g * (t.v * inverse);
  return {d_grad_w.to(grad_w.scalar_type()), d_v.to(v.scalar_type()),
          (along * inverse).to(g.scalar_type())};
}

}  // namespace wnkernel::composed
