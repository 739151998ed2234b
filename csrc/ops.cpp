// Schemas of torch.ops.wnkernel, and the calls through the dispatcher that C++ code makes.
//
// v, g, dim, eps and out_dtype are those of wnkernel/functional.py.
//
// weight_norm: w of one weight. Differentiable to any order.
//
// forward: w and norm of a list in one launch. norm is not clamped by eps, and float32 for half
// types. w is differentiable, all of the list through one node; norm is not.
//
// backward: first derivatives of a list in one launch. grad_v holds those with need_v, grad_g those
// with need_g. Differentiable; norm counts as a function of v there, not as an input.
#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace wnkernel {

TORCH_LIBRARY(wnkernel, m) {
  m.def(
      "weight_norm(Tensor v, Tensor g, int dim, float eps=0., ScalarType? out_dtype=None) -> "
      "Tensor");
  m.def(
      "forward(Tensor[] v, Tensor[] g, int[] dim, float[] eps, ScalarType? out_dtype=None) -> "
      "(Tensor[] w, Tensor[] norm)");
  m.def(
      "backward(Tensor[] grad_w, Tensor[] v, Tensor[] g, Tensor[] norm, int[] dim, float[] eps, "
      "int[] need_v, int[] need_g) -> (Tensor[] grad_v, Tensor[] grad_g)");
}

namespace {

template <class F>
c10::TypedOperatorHandle<F> find(const char* name, F*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

}  // namespace

at::Tensor weight_norm(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                       std::optional<at::ScalarType> out_dtype) {
  static const auto op = find("wnkernel::weight_norm", weight_norm);
  return op.call(v, g, dim, eps, out_dtype);
}

std::tuple<Tensors, Tensors> forward(at::TensorList v, at::TensorList g, at::IntArrayRef dim,
                                     at::ArrayRef<double> eps,
                                     std::optional<at::ScalarType> out_dtype) {
  static const auto op = find("wnkernel::forward", forward);
  return op.call(v, g, dim, eps, out_dtype);
}

std::tuple<Tensors, Tensors> backward(at::TensorList grad_w, at::TensorList v, at::TensorList g,
                                      at::TensorList norm, at::IntArrayRef dim,
                                      at::ArrayRef<double> eps, at::IntArrayRef need_v,
                                      at::IntArrayRef need_g) {
  static const auto op = find("wnkernel::backward", backward);
  return op.call(grad_w, v, g, norm, dim, eps, need_v, need_g);
}

}  // namespace wnkernel
