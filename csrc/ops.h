// The operators of torch.ops.wnkernel, as C++ functions that go through the dispatcher.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace wnkernel {

using Tensors = std::vector<at::Tensor>;

// w = g * v / max(norm(v), eps).
at::Tensor weight_norm(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                       std::optional<at::ScalarType> out_dtype);

// The same for a list in one launch, with the norms that backward() wants.
std::tuple<Tensors, Tensors> forward(at::TensorList v, at::TensorList g, at::IntArrayRef dim,
                                     at::ArrayRef<double> eps,
                                     std::optional<at::ScalarType> out_dtype);

// First derivatives of a list in one launch: grad_v where need_v, grad_g where need_g (0 or 1:
// int[] costs no memory in a call, bool[] does).
std::tuple<Tensors, Tensors> backward(at::TensorList grad_w, at::TensorList v, at::TensorList g,
                                      at::TensorList norm, at::IntArrayRef dim,
                                      at::ArrayRef<double> eps, at::IntArrayRef need_v,
                                      at::IntArrayRef need_g);

}  // namespace wnkernel
