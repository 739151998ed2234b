#include "composed.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "problem.h"

namespace wnkernel::composed {
namespace {

// One weight norm in the accumulation dtype: v and g cast, norms clamped.
struct Terms {
  std::vector<int64_t> dims;  // that a norm sums over
  at::ScalarType acc;
  at::Tensor v, g, inverse;  // inverse: 1 / max(norm, eps)
  at::Tensor clamped;        // norm < eps; undefined with eps 0

  Terms(const at::Tensor& v_, const at::Tensor& g_, int64_t dim, double eps)
      : acc(accumulation_dtype(v_.scalar_type())), v(v_.to(acc)), g(g_.to(acc)) {
    dim = canonical_dim(dim, v.dim());
    for (int64_t k = 0; k < v.dim(); ++k)
      if (k != dim) dims.push_back(k);
    if (eps == 0.0) {
      inverse = norm(v).reciprocal();
      return;
    }
    // Clamped rows are replaced before the norm: its derivative at a zero row is 0/0.
    clamped = norm(v.detach()) < eps;
    const at::Tensor safe = norm(at::where(clamped, at::ones({}, v.options()), v));
    inverse = at::where(clamped, at::full({}, eps, v.options()), safe).reciprocal();
  }

  at::Tensor row_sum(const at::Tensor& x) const {
    return dims.empty() ? x : x.sum(dims, true).reshape_symint(g.sym_sizes());
  }

  at::Tensor norm(const at::Tensor& x) const {
    if (dims.empty()) return x.abs();
    if (x.sym_numel() == 0) return row_sum(x);
    at::Tensor scale = x.detach().abs().amax(dims, true);
    scale = at::where((scale > 0).logical_and(scale.isfinite()), scale, at::ones({}, x.options()));
    return (at::linalg_vector_norm(x / scale, 2, dims, true) * scale).reshape_symint(g.sym_sizes());
  }

  // x where the norm is differentiated, 0 where it is clamped.
  at::Tensor unclamped(const at::Tensor& x) const {
    return clamped.defined() ? x.masked_fill(clamped, 0.0) : x;
  }
};

}  // namespace

at::Tensor weight_norm(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                       std::optional<at::ScalarType> out_dtype) {
  const Terms t(v, g, dim, eps);
  return (t.v * (t.g * t.inverse)).to(out_dtype.value_or(v.scalar_type()));
}

std::pair<at::Tensor, at::Tensor> backward(const at::Tensor& grad_w, const at::Tensor& v,
                                           const at::Tensor& g, int64_t dim, double eps) {
  const Terms t(v, g, dim, eps);
  const at::Tensor dw = grad_w.to(t.acc), u = t.v * t.inverse, s = t.row_sum(dw * u);
  const at::Tensor grad_v = (t.g * t.inverse) * (dw - u * t.unclamped(s));
  return {grad_v.to(v.scalar_type()), s.to(g.scalar_type())};
}

std::array<at::Tensor, 3> double_backward(const at::Tensor& grad_w, const at::Tensor& v,
                                          const at::Tensor& g, const at::Tensor& gg_v_,
                                          const at::Tensor& gg_g_, int64_t dim, double eps) {
  const Terms t(v, g, dim, eps);
  const at::Tensor dw = grad_w.to(t.acc), u = t.v * t.inverse, c = t.g * t.inverse;
  const at::Tensor gg_v = gg_v_.defined() ? gg_v_.to(t.acc) : at::zeros_like(t.v);
  const at::Tensor gg_g = gg_g_.defined() ? gg_g_.to(t.acc) : at::zeros_like(t.g);
  const at::Tensor a = t.unclamped(t.row_sum(gg_v * u)), s = t.unclamped(t.row_sum(dw * u));
  const at::Tensor across_v = gg_v - u * a, across_w = dw - u * s;
  const at::Tensor along = t.row_sum(gg_v * dw) - a * s;
  const at::Tensor through_norm = t.unclamped(along * u + s * across_v + a * across_w);
  const at::Tensor d_v = t.inverse * (gg_g * across_w - c * through_norm);
  return {(c * across_v + gg_g * u).to(grad_w.scalar_type()), d_v.to(v.scalar_type()),
          (along * t.inverse).to(g.scalar_type())};
}

}  // namespace wnkernel::composed
