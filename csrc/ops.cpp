// The schemas of torch.ops.wnkernel, and the calls through the dispatcher that C++ code makes.
//
// wnkernel/functional.py describes v, g, dim, eps and out_dtype.
//
// weight_norm returns w of one weight. It is differentiable to any order.
//
// forward_one returns w and norm of one weight. norm is not clamped by eps, and is float32 for half
// types. w is differentiable, norm is not.
//
// backward_one returns the first derivatives of one weight; a gradient that is not wanted has no
// elements. It is differentiable. Its derivative treats norm as a function of v, not as an input.
//
// forward and backward do the same for a list in one launch, with one autograd node. Each returns
// one list, because the C++ code that torch.compile generates can take only one: every w, then
// every norm; or grad_v of weights with need_v, then grad_g of weights with need_g.
//
// A negative eps is added to norms instead of bounding them; see weight_norm.h.
//
// forced is a forward that replaces each v first, so that its norm is the one given, unless that is
// 0. It is differentiable as a weight norm of the new v is. The new v is written without autograd,
// whatever requires grad.
//
// normalize_ scales every row of each v so that its norm is g, in place and in one launch, and
// returns the norms that were there. A row of zeros stays. v must be dense. It has no autograd: the
// caller has to see to it that no v requires grad.
//
// bucket is a note for wnkernel/compiled_graphs.py, which makes lists of single weights.
#include "ops.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace wnkernel {

TORCH_LIBRARY(wnkernel, m) {
  m.def(
      "weight_norm(Tensor v, Tensor g, int dim, float eps=0., ScalarType? out_dtype=None, int? "
      "bucket=None) -> Tensor");
  m.def(
      "forward_one(Tensor v, Tensor g, int dim, float eps=0., ScalarType? out_dtype=None, int? "
      "bucket=None) -> (Tensor w, Tensor norm)");
  m.def(
      "backward_one(Tensor grad_w, Tensor v, Tensor g, Tensor norm, int dim, float eps, bool "
      "need_v, bool need_g, int? bucket=None) -> (Tensor grad_v, Tensor grad_g)");
  m.def(
      "forward(Tensor[] v, Tensor[] g, int[] dim, float[] eps, ScalarType? out_dtype=None) -> "
      "Tensor[]");
  m.def(
      "backward(Tensor[] grad_w, Tensor[] v, Tensor[] g, Tensor[] norm, int[] dim, float[] eps, "
      "int[] need_v, int[] need_g) -> Tensor[]");
  m.def(
      "forced(Tensor(a!)[] v, Tensor[] g, float[] forced, int[] dim, float[] eps, ScalarType? "
      "out_dtype=None) -> Tensor[]");
  m.def("normalize_(Tensor(a!)[] v, Tensor[] g, int[] dim, float[] eps) -> Tensor[]");
}

namespace {

template <class F>
c10::TypedOperatorHandle<F> find(const char* name, F*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

}  // namespace

at::Tensor weight_norm(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                       std::optional<at::ScalarType> out_dtype, Bucket bucket) {
  static const auto op = find("wnkernel::weight_norm", weight_norm);
  return op.call(v, g, dim, eps, out_dtype, bucket);
}

TensorPair forward_one(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                       std::optional<at::ScalarType> out_dtype, Bucket bucket) {
  static const auto op = find("wnkernel::forward_one", forward_one);
  return op.call(v, g, dim, eps, out_dtype, bucket);
}

TensorPair backward_one(const at::Tensor& grad_w, const at::Tensor& v, const at::Tensor& g,
                        const at::Tensor& norm, int64_t dim, double eps, bool need_v, bool need_g,
                        Bucket bucket) {
  static const auto op = find("wnkernel::backward_one", backward_one);
  return op.call(grad_w, v, g, norm, dim, eps, need_v, need_g, bucket);
}

at::Tensor not_wanted(const at::Tensor& like) { return at::empty({0}, like.options()); }

Tensors forward(at::TensorList v, at::TensorList g, at::IntArrayRef dim, at::ArrayRef<double> eps,
                std::optional<at::ScalarType> out_dtype) {
  static const auto op = find("wnkernel::forward", forward);
  return op.call(v, g, dim, eps, out_dtype);
}

Tensors forced(at::TensorList v, at::TensorList g, at::ArrayRef<double> norms, at::IntArrayRef dim,
               at::ArrayRef<double> eps, std::optional<at::ScalarType> out_dtype) {
  static const auto op = find("wnkernel::forced", forced);
  return op.call(v, g, norms, dim, eps, out_dtype);
}

Tensors backward(at::TensorList grad_w, at::TensorList v, at::TensorList g, at::TensorList norm,
                 at::IntArrayRef dim, at::ArrayRef<double> eps, at::IntArrayRef need_v,
                 at::IntArrayRef need_g) {
  static const auto op = find("wnkernel::backward", backward);
  return op.call(grad_w, v, g, norm, dim, eps, need_v, need_g);
}

}  // namespace wnkernel
