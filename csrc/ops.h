// The operators of torch.ops.wnkernel, as C++ functions that go through the dispatcher.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace wnkernel {

using Tensors = std::vector<at::Tensor>;
using TensorPair = std::tuple<at::Tensor, at::Tensor>;

// bucket: which launch of a compiled graph a weight joins (wnkernel/compiled_graphs.py). Nothing
// else looks at it.
using Bucket = std::optional<int64_t>;

// w = g * v / max(norm(v), eps).
at::Tensor weight_norm(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                       std::optional<at::ScalarType> out_dtype, Bucket bucket = std::nullopt);

// The same with the norm that backward_one() wants.
TensorPair forward_one(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                       std::optional<at::ScalarType> out_dtype, Bucket bucket = std::nullopt);

// grad_v and grad_g of one weight, each without elements if it is not wanted.
TensorPair backward_one(const at::Tensor& grad_w, const at::Tensor& v, const at::Tensor& g,
                        const at::Tensor& norm, int64_t dim, double eps, bool need_v, bool need_g,
                        Bucket bucket = std::nullopt);

// What an operator returns in the place of a gradient that nobody wants.
at::Tensor not_wanted(const at::Tensor& like);

// A list in one launch: every w, then every norm.
Tensors forward(at::TensorList v, at::TensorList g, at::IntArrayRef dim, at::ArrayRef<double> eps,
                std::optional<at::ScalarType> out_dtype);

// First derivatives of a list in one launch: grad_v where need_v, then grad_g where need_g (0 or 1:
// int[] costs no memory in a call, bool[] does).
Tensors backward(at::TensorList grad_w, at::TensorList v, at::TensorList g, at::TensorList norm,
                 at::IntArrayRef dim, at::ArrayRef<double> eps, at::IntArrayRef need_v,
                 at::IntArrayRef need_g);

// w and norm of one CPU tensor, and its first derivatives (undefined where they are not wanted):
// the operators without the dispatcher, for callers who know that nobody waits there.
TensorPair forward_on_cpu(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                          std::optional<at::ScalarType> out_dtype);
TensorPair backward_on_cpu(const at::Tensor& grad_w, const at::Tensor& v, const at::Tensor& g,
                           const at::Tensor& norm, int64_t dim, double eps, bool need_v,
                           bool need_g);

}  // namespace wnkernel
