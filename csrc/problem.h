// The argument checks, dim rules and memory-order rules of a weight norm, on tensors. It is the
// twin of wnkernel/problem.py. Kernels know no `dim`: they get the view that row_view() makes.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "weight_norm.h"

namespace wnkernel {

constexpr int64_t kWholeTensor = -1;

// The dim as kWholeTensor or a number from 0. None and -1 mean the whole tensor; -2, -3, ... count
// from the end. Throws ValueError if it is out of range.
int64_t canonical_dim(int64_t dim, int64_t ndim);

// Checks layouts and devices, without which the dispatcher cannot choose a kernel. Throws like
// check_forward().
void check_placement(const at::Tensor& v, const at::Tensor& g);

// Both throw a TypeError or ValueError that names the argument, what was expected and what came.
void check_forward(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                   std::optional<at::ScalarType> out_dtype);
void check_backward(const at::Tensor& grad_w, const at::Tensor& v, const at::Tensor& g,
                    const at::Tensor& norm, int64_t dim, double eps);

// Both throw ValueError if the lists have different lengths. Call them before reading any entry.
void check_forward_lengths(at::TensorList v, at::TensorList g, at::IntArrayRef dim,
                           at::ArrayRef<double> eps);
void check_backward_lengths(at::TensorList grad_w, at::TensorList v, at::TensorList g,
                            at::TensorList norm, at::IntArrayRef dim, at::ArrayRef<double> eps,
                            at::IntArrayRef need_v, at::IntArrayRef need_g);

// Throws ValueError if the lists have different lengths, or a forced norm is negative or not
// finite.
void check_forced(at::TensorList v, at::ArrayRef<double> forced);

// Throws ValueError if the v are not all on one device: the dispatcher looks at any one of a list.
void check_one_device(at::TensorList v);

// Throws ValueError if v has gaps or shares elements, so that it has no view of rows.
void check_dense(const at::Tensor& v);

// The view [outer, rows, inner] of a dense, non-empty tensor in memory order. The dim must be
// checked.
RowView row_view(const at::Tensor& v, int64_t dim);

// float64 for float64, float32 for all other types.
at::ScalarType accumulation_dtype(at::ScalarType dtype);

// The type to which the norm is rounded before w divides by it. It is the type of norm, with one
// exception: one norm over all of v, where v and g have half types. Then it is the type of g, as in
// torch, so that the norm of v as g gives w = v.
at::ScalarType divisor_dtype(const at::Tensor& v, const at::Tensor& g);

DType dtype_of(at::ScalarType dtype);

// The number of writes so far, as autograd counts them. Inference tensors have no counter.
inline int64_t version_of(const at::Tensor& t) { return t.is_inference() ? 0 : t._version(); }

}  // namespace wnkernel
