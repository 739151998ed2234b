#include "problem.h"

#include <cmath>

namespace wnkernel {
namespace {

constexpr const char* kFloatNames = "float16, bfloat16, float32 or float64";

bool is_float(at::ScalarType t) {
  return t == at::kFloat || t == at::kHalf || t == at::kBFloat16 || t == at::kDouble;
}

bool is_half(const at::Tensor& t) {
  return t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16;
}

void check_layout(const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.defined(), name, ": expected a torch.Tensor, got None");
  TORCH_CHECK_TYPE(t.layout() == at::kStrided && !t.is_quantized(), name,
                   ": expected a dense strided tensor, got a ",
                   t.is_quantized() ? "quantized" : c10::str(t.layout()), " one");
}

void check_tensor(const char* name, const at::Tensor& t) {
  check_layout(name, t);
  TORCH_CHECK_TYPE(is_float(t.scalar_type()), name, ": expected dtype ", kFloatNames, ", got ",
                   t.scalar_type());
}

void check_device(const char* name, const at::Tensor& t, const at::Tensor& v) {
  TORCH_CHECK_VALUE(t.device() == v.device(), name, ": expected device ", v.device(),
                    " (that of v), got ", t.device());
}

// Sizes are symbolic, because these checks also run under tracing and function transforms.
c10::SymDimVector norm_shape(const at::Tensor& v, int64_t dim) {
  if (dim == kWholeTensor) return {};
  c10::SymDimVector shape(v.dim(), 1);
  shape[dim] = v.sym_size(dim);
  return shape;
}

void check_length(const char* name, size_t got, size_t expected) {
  TORCH_CHECK_VALUE(got == expected, name, ": expected ", expected, " entries (one per v), got ",
                    got);
}

// One norm over the whole tensor may also have shape [1]; is_norm_shape in wnkernel/problem.py says
// why.
void check_g(const at::Tensor& g, const at::Tensor& v, int64_t dim) {
  check_tensor("g", g);
  check_device("g", g, v);
  const c10::SymDimVector shape = norm_shape(v, dim);
  if (g.sym_sizes() == c10::SymIntArrayRef(shape)) return;
  if (dim == kWholeTensor && g.dim() == 1 && g.sym_size(0) == 1) return;
  TORCH_CHECK_VALUE(false, "g: expected shape ",
                    dim == kWholeTensor ? "[] or [1]" : c10::str(c10::SymIntArrayRef(shape)),
                    " for v of shape ", v.sym_sizes(), " and dim ", dim, ", got ", g.sym_sizes());
}

}  // namespace

int64_t canonical_dim(int64_t dim, int64_t ndim) {
  TORCH_CHECK_VALUE(-ndim <= dim && dim < ndim, "dim: expected -", ndim, " <= dim < ", ndim,
                    " or None, got ", dim);
  return dim >= kWholeTensor ? dim : dim + ndim;
}

void check_placement(const at::Tensor& v, const at::Tensor& g) {
  check_layout("v", v);
  check_layout("g", g);
  check_device("g", g, v);
}

void check_forward(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                   std::optional<at::ScalarType> out_dtype) {
  check_tensor("v", v);
  TORCH_CHECK_VALUE(v.dim() > 0, "v: expected at least 1 dimension, got a 0-dimensional tensor");
  dim = canonical_dim(dim, v.dim());
  check_g(g, v, dim);
  TORCH_CHECK_VALUE(std::isfinite(eps),
                    "eps: expected a finite number, >= 0 as a bound or < 0 to be added, got ", eps);
  TORCH_CHECK_TYPE(!out_dtype || is_float(*out_dtype), "out_dtype: expected ", kFloatNames,
                   ", got ", *out_dtype);
}

void check_backward(const at::Tensor& grad_w, const at::Tensor& v, const at::Tensor& g,
                    const at::Tensor& norm, int64_t dim, double eps) {
  check_forward(v, g, dim, eps, std::nullopt);
  check_tensor("grad_w", grad_w);
  check_device("grad_w", grad_w, v);
  TORCH_CHECK_VALUE(grad_w.sym_sizes() == v.sym_sizes(), "grad_w: expected shape ", v.sym_sizes(),
                    " (that of v), got ", grad_w.sym_sizes());
  check_tensor("norm", norm);
  check_device("norm", norm, v);
  TORCH_CHECK_VALUE(norm.sym_sizes() == g.sym_sizes(), "norm: expected shape ", g.sym_sizes(),
                    " (that of g), got ", norm.sym_sizes());
  TORCH_CHECK_TYPE(norm.scalar_type() == accumulation_dtype(v.scalar_type()),
                   "norm: expected dtype ", accumulation_dtype(v.scalar_type()), ", got ",
                   norm.scalar_type());
}

void check_forward_lengths(at::TensorList v, at::TensorList g, at::IntArrayRef dim,
                           at::ArrayRef<double> eps) {
  check_length("g", g.size(), v.size());
  check_length("dim", dim.size(), v.size());
  check_length("eps", eps.size(), v.size());
}

void check_backward_lengths(at::TensorList grad_w, at::TensorList v, at::TensorList g,
                            at::TensorList norm, at::IntArrayRef dim, at::ArrayRef<double> eps,
                            at::IntArrayRef need_v, at::IntArrayRef need_g) {
  check_forward_lengths(v, g, dim, eps);
  check_length("grad_w", grad_w.size(), v.size());
  check_length("norm", norm.size(), v.size());
  check_length("need_v", need_v.size(), v.size());
  check_length("need_g", need_g.size(), v.size());
}

void check_forced(at::TensorList v, at::ArrayRef<double> forced) {
  check_length("forced", forced.size(), v.size());
  for (const double norm : forced)
    TORCH_CHECK_VALUE(norm >= 0.0 && std::isfinite(norm),
                      "forced: expected finite numbers >= 0, got ", norm);
}

void check_one_device(at::TensorList v) {
  for (size_t k = 1; k < v.size(); ++k)
    TORCH_CHECK_VALUE(v[k].device() == v[0].device(), "v: expected all on ", v[0].device(),
                      ", entry ", k, " is on ", v[k].device());
}

void check_dense(const at::Tensor& v) {
  TORCH_CHECK_VALUE(v.is_non_overlapping_and_dense(),
                    "v: expected a tensor that fills its memory without gaps or repeats, got one "
                    "of shape ",
                    v.sizes(), " and strides ", v.strides());
}

RowView row_view(const at::Tensor& v, int64_t dim) {
  if (dim == kWholeTensor || v.size(dim) == 1) return {1, 1, v.numel()};
  const int64_t rows = v.size(dim), inner = v.stride(dim);
  return {v.numel() / (rows * inner), rows, inner};
}

at::ScalarType accumulation_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

at::ScalarType divisor_dtype(const at::Tensor& v, const at::Tensor& g) {
  const bool as_g = is_half(v) && is_half(g) && g.sym_numel() == 1;
  return as_g ? g.scalar_type() : accumulation_dtype(v.scalar_type());
}

DType dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return DType::f16;
    case at::kBFloat16:
      return DType::bf16;
    case at::kFloat:
      return DType::f32;
    default:
      return DType::f64;
  }
}

}  // namespace wnkernel
