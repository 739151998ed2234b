// What a weight norm is asked to do: argument checks, dim rules and memory-order rules, on tensors.
// The twin of wnkernel/problem.py. Kernels know of no `dim`: they are given what row_view() makes.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "weight_norm.h"

namespace wnkernel {

constexpr int64_t kWholeTensor = -1;

// None and -1: the whole tensor; -2, -3, ... count from the end. Throws ValueError out of range.
int64_t canonical_dim(int64_t dim, int64_t ndim);

// Whether the dispatcher can choose a kernel at all: layouts and devices. Throws as below.
void check_placement(const at::Tensor& v, const at::Tensor& g);

// Throw TypeError or ValueError that names the argument, what was expected and what came.
void check_forward(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                   std::optional<at::ScalarType> out_dtype);
void check_backward(const at::Tensor& grad_w, const at::Tensor& v, const at::Tensor& g,
                    const at::Tensor& norm, int64_t dim, double eps);

// Lists of different lengths throw ValueError; to be called before any entry is looked at.
void check_forward_lengths(at::TensorList v, at::TensorList g, at::IntArrayRef dim,
                           at::ArrayRef<double> eps);
void check_backward_lengths(at::TensorList grad_w, at::TensorList v, at::TensorList g,
                            at::TensorList norm, at::IntArrayRef dim, at::ArrayRef<double> eps,
                            at::IntArrayRef need_v, at::IntArrayRef need_g);

// The dispatcher chooses by any of a list; throws ValueError if v are not all on one device.
void check_one_device(at::TensorList v);

// [outer, rows, inner] of a dense, non-empty tensor, in memory order, for a dim that was checked.
RowView row_view(const at::Tensor& v, int64_t dim);

// float64 for float64, float32 for the others.
at::ScalarType accumulation_dtype(at::ScalarType dtype);

// The type whose values w divides by: the one of norms, but for one norm over all of v where v and
// g have half types. There it is that of g, as in torch, so that the norm of v as g gives w = v.
at::ScalarType divisor_dtype(const at::Tensor& v, const at::Tensor& g);

DType dtype_of(at::ScalarType dtype);

// Writes so far, as autograd counts them; inference tensors have no counter.
inline int64_t version_of(const at::Tensor& t) { return t.is_inference() ? 0 : t._version(); }

}  // namespace wnkernel
