// The operators of torch.ops.wnkernel, as C++ functions that go through the dispatcher.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace wnkernel {

using Tensors = std::vector<at::Tensor>;
using TensorPair = std::tuple<at::Tensor, at::Tensor>;

// bucket says which launch of a compiled graph a weight joins (wnkernel/compiled_graphs.py).
// Nothing else reads it.
using Bucket = std::optional<int64_t>;

// w = g * v / max(norm(v), eps).
at::Tensor weight_norm(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                       std::optional<at::ScalarType> out_dtype, Bucket bucket = std::nullopt);

// Returns w, and the norm that backward_one() needs.
TensorPair forward_one(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                       std::optional<at::ScalarType> out_dtype, Bucket bucket = std::nullopt);

// Returns grad_v and grad_g of one weight; a gradient that is not wanted has no elements.
TensorPair backward_one(const at::Tensor& grad_w, const at::Tensor& v, const at::Tensor& g,
                        const at::Tensor& norm, int64_t dim, double eps, bool need_v, bool need_g,
                        Bucket bucket = std::nullopt);

// The placeholder that an operator returns for a gradient that is not wanted.
at::Tensor not_wanted(const at::Tensor& like);

// Computes a list of weights in one launch, and returns every w, then every norm.
Tensors forward(at::TensorList v, at::TensorList g, at::IntArrayRef dim, at::ArrayRef<double> eps,
                std::optional<at::ScalarType> out_dtype);

// The same with weights whose v is replaced first.
Tensors forced(at::TensorList v, at::TensorList g, at::ArrayRef<double> norms, at::IntArrayRef dim,
               at::ArrayRef<double> eps, std::optional<at::ScalarType> out_dtype);

// Computes the first derivatives of a list in one launch: grad_v of each weight with need_v, then
// grad_g of each with need_g. These are int[] of 0 or 1, because bool[] would allocate memory in a
// call.
Tensors backward(at::TensorList grad_w, at::TensorList v, at::TensorList g, at::TensorList norm,
                 at::IntArrayRef dim, at::ArrayRef<double> eps, at::IntArrayRef need_v,
                 at::IntArrayRef need_g);

// forward_on_cpu returns w and norm of one CPU tensor; backward_on_cpu returns grad_v and grad_g,
// each undefined if it is not wanted. Both skip the dispatcher, so the caller must know that
// nothing intercepts the call there.
TensorPair forward_on_cpu(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                          std::optional<at::ScalarType> out_dtype);
TensorPair backward_on_cpu(const at::Tensor& grad_w, const at::Tensor& v, const at::Tensor& g,
                           const at::Tensor& norm, int64_t dim, double eps, bool need_v,
                           bool need_g);

}  // namespace wnkernel
