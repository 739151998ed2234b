// The functions of autograd.cpp that the autograd node of a launch calls.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>

#include "ops.h"

namespace wnkernel {

// Whether grad mode is on and one of the tensors requires grad.
bool needs_grad(at::TensorList tensors);

// Whether a function transform or forward-mode AD is active. No C++ node supports these.
bool is_transformed(at::TensorList tensors);

// Whether nothing intercepts calls between autograd and the CPU kernels: no mode, no tracer and no
// profiler is active, and the tensors are plain CPU tensors. Then the call for one weight skips the
// dispatcher. (A sampling observer is asked twice: here and by the dispatcher.)
bool is_direct(c10::DispatchKeySet tensors);

// The operators backward_one and backward, as differentiable functions.
TensorPair first_derivative(const at::Tensor& grad_w, const at::Tensor& v, const at::Tensor& g,
                            const at::Tensor& norm, int64_t dim, double eps, bool need_v,
                            bool need_g, Bucket bucket);
Tensors first_derivatives(at::TensorList grad_w, at::TensorList v, at::TensorList g,
                          at::TensorList norm, at::IntArrayRef dim, at::ArrayRef<double> eps,
                          at::IntArrayRef need_v, at::IntArrayRef need_g);

}  // namespace wnkernel
