// The weight norm in ordinary ATen operators, for function transforms, forward-mode AD and the
// second derivative. It is the twin of wnkernel/composed.py, which explains the formulas.
#pragma once
#include <array>
#include <utility>

#include "ops.h"

namespace wnkernel::composed {

// The operators, with their argument checks.
at::Tensor weight_norm(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                       std::optional<at::ScalarType> out_dtype, Bucket = std::nullopt);
TensorPair forward_one(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                       std::optional<at::ScalarType> out_dtype, Bucket = std::nullopt);
TensorPair backward_one(const at::Tensor& grad_w, const at::Tensor& v, const at::Tensor& g,
                        const at::Tensor& norm, int64_t dim, double eps, bool need_v, bool need_g,
                        Bucket = std::nullopt);
Tensors forward(at::TensorList v, at::TensorList g, at::IntArrayRef dim, at::ArrayRef<double> eps,
                std::optional<at::ScalarType> out_dtype);
Tensors backward(at::TensorList grad_w, at::TensorList v, at::TensorList g, at::TensorList norm,
                 at::IntArrayRef dim, at::ArrayRef<double> eps, at::IntArrayRef need_v,
                 at::IntArrayRef need_g);

// The gradients of <gg_v, grad_v> + <gg_g, grad_g> with respect to grad_w, v and g. gg_v and gg_g
// may be undefined.
std::array<at::Tensor, 3> double_backward(const at::Tensor& grad_w, const at::Tensor& v,
                                          const at::Tensor& g, const at::Tensor& gg_v,
                                          const at::Tensor& gg_g, int64_t dim, double eps);

}  // namespace wnkernel::composed
