// What the autograd node of a launch needs of autograd.cpp.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>

#include "ops.h"

namespace wnkernel {

// Whether grad mode is on and one of them requires grad.
bool needs_grad(at::TensorList tensors);

// Function transforms and forward-mode AD, which no C++ node supports.
bool is_transformed(at::TensorList tensors);

// Whether nobody waits between autograd and the CPU kernels, so that one weight need not go through
// the dispatcher again: no mode, no tracer, no profiler, and tensors that are memory and no more.
// (An observer that samples is asked twice, here and by the dispatcher.)
bool is_direct(c10::DispatchKeySet tensors);

// The operators backward_one and backward, differentiable.
TensorPair first_derivative(const at::Tensor& grad_w, const at::Tensor& v, const at::Tensor& g,
                            const at::Tensor& norm, int64_t dim, double eps, bool need_v,
                            bool need_g, Bucket bucket);
Tensors first_derivatives(at::TensorList grad_w, at::TensorList v, at::TensorList g,
                          at::TensorList norm, at::IntArrayRef dim, at::ArrayRef<double> eps,
                          at::IntArrayRef need_v, at::IntArrayRef need_g);

}  // namespace wnkernel
