// The operators of torch.ops.wnkernel, as C++ functions that go through the dispatcher.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <utility>
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

// w and norm of one CPU tensor, and its first derivatives (undefined where they are not wanted):
// the operators without the dispatcher, for callers who know that nobody waits there.
std::pair<at::Tensor, at::Tensor> forward_on_cpu(const at::Tensor& v, const at::Tensor& g,
                                                 int64_t dim, double eps,
                                                 std::optional<at::ScalarType> out_dtype);
std::pair<at::Tensor, at::Tensor> backward_on_cpu(const at::Tensor& grad_w, const at::Tensor& v,
                                                  const at::Tensor& g, const at::Tensor& norm,
                                                  int64_t dim, double eps, bool need_v,
                                                  bool need_g);

}  // namespace wnkernel
