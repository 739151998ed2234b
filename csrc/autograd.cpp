// Autograd under the dispatcher: one node for the weight norms of a launch (node.h), and the first
// derivative as an operation that can be differentiated again.
#include "autograd.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <utility>

#include "composed.h"
#include "node.h"
#include "problem.h"
#include "saved.h"

namespace wnkernel {

bool needs_grad(at::TensorList tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const at::Tensor& t : tensors)
    if (t.requires_grad()) return true;
  return false;
}

bool is_transformed(at::TensorList tensors) {
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode))
    return true;
  for (const at::Tensor& t : tensors)
    if (t._fw_grad(/*level=*/0).defined()) return true;
  return false;
}

bool is_direct(c10::DispatchKeySet tensors) {
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet above =  // keys without kernels of this library
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset |
      c10::DispatchKeySet(c10::DispatchKey::BackendSelect);
  const c10::DispatchKeySet left = (tensors | local.included_) - local.excluded_ - above;
  return left.highestPriorityTypeId() == c10::DispatchKey::CPU &&
         !at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The tensors that the second derivative reads. They are one entry of saved_data, because every
// entry costs a hash of its name.
struct SavedWeights : torch::CustomClassHolder {
  c10::SmallVector<Saved, 1> weights;

  static void store(AutogradContext* ctx, at::TensorList v, at::TensorList g, at::TensorList extra,
                    at::IntArrayRef dim, at::ArrayRef<double> eps) {
    auto saved = c10::make_intrusive<SavedWeights>();
    saved->weights.reserve(v.size());
    for (size_t k = 0; k < v.size(); ++k)
      saved->weights.emplace_back(v[k], g[k], extra[k], dim[k], eps[k]);
    ctx->saved_data["weights"] = c10::IValue::make_capsule(std::move(saved));
  }

  static at::ArrayRef<Saved> load(AutogradContext* ctx) {
    const auto holder = ctx->saved_data["weights"].toCapsule();  // saved_data keeps it alive
    return static_cast<SavedWeights&>(*holder).weights;
  }
};

// The first derivative as a differentiable operation. Its inputs are grad_w, v and g of every
// problem. Its outputs are every wanted grad_v, then every wanted grad_g.
struct FirstDerivative : torch::autograd::Function<FirstDerivative> {
  static variable_list forward(AutogradContext* ctx, at::TensorList grad_w, at::TensorList v,
                               at::TensorList g, at::TensorList norm, at::IntArrayRef dim,
                               at::ArrayRef<double> eps, at::IntArrayRef need_v,
                               at::IntArrayRef need_g) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensors grads = wnkernel::backward(grad_w, v, g, norm, dim, eps, need_v, need_g);
    SavedWeights::store(ctx, v, g, grad_w, dim, eps);  // the operator has checked the lists
    ctx->saved_data["need_v"] = need_v;
    ctx->saved_data["need_g"] = need_g;
    ctx->set_materialize_grads(false);
    return grads;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const at::ArrayRef<Saved> saved = SavedWeights::load(ctx);
    const auto need_v = ctx->saved_data["need_v"].toIntVector();
    const auto need_g = ctx->saved_data["need_g"].toIntVector();
    const size_t count = need_v.size();
    Tensors gg_v(count), gg_g(count);
    size_t next = 0;
    for (size_t k = 0; k < count; ++k)
      if (need_v[k]) gg_v[k] = outputs[next++];
    for (size_t k = 0; k < count; ++k)
      if (need_g[k]) gg_g[k] = outputs[next++];
    variable_list grads(4 * count + 4);
    for (size_t k = 0; k < count; ++k) {
      if (!gg_v[k].defined() && !gg_g[k].defined()) continue;
      const Saved& w = saved[k];
      w.check_versions("grad_w");
      auto [d_grad_w, d_v, d_g] =
          composed::double_backward(w.extra, w.v, w.g, gg_v[k], gg_g[k], w.dim, w.eps);
      grads[k] = d_grad_w;
      grads[count + k] = d_v;
      grads[2 * count + k] = d_g;
    }
    return grads;
  }
};

}  // namespace

TensorPair first_derivative(const at::Tensor& grad_w, const at::Tensor& v, const at::Tensor& g,
                            const at::Tensor& norm, int64_t dim, double eps, bool need_v,
                            bool need_g, Bucket bucket) {
  const at::Tensor inputs[] = {grad_w, v, g};
  if (is_transformed(inputs))
    return composed::backward_one(grad_w, v, g, norm, dim, eps, need_v, need_g);
  if (!needs_grad(inputs)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return backward_one(grad_w, v, g, norm, dim, eps, need_v, need_g, bucket);
  }
  const int64_t wanted[] = {need_v, need_g};
  Tensors grads =
      FirstDerivative::apply(at::TensorList(grad_w), at::TensorList(v), at::TensorList(g),
                             at::TensorList(norm), at::IntArrayRef(dim), at::ArrayRef<double>(eps),
                             at::IntArrayRef(wanted[0]), at::IntArrayRef(wanted[1]));
  return {need_v ? std::move(grads.front()) : not_wanted(v),
          need_g ? std::move(grads.back()) : not_wanted(g)};
}

Tensors first_derivatives(at::TensorList grad_w, at::TensorList v, at::TensorList g,
                          at::TensorList norm, at::IntArrayRef dim, at::ArrayRef<double> eps,
                          at::IntArrayRef need_v, at::IntArrayRef need_g) {
  if (is_transformed(grad_w) || is_transformed(v) || is_transformed(g))
    return composed::backward(grad_w, v, g, norm, dim, eps, need_v, need_g);
  if (!needs_grad(grad_w) && !needs_grad(v) && !needs_grad(g)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return backward(grad_w, v, g, norm, dim, eps, need_v, need_g);
  }
  return FirstDerivative::apply(grad_w, v, g, norm, dim, eps, need_v, need_g);
}

namespace {

// Deletes a node that a shared pointer held, without recursion. torch's deleteNode handles the
// edges, but v may hold the last pointer to the node before. So the call that deletes the first
// node of a chain collects the tensors of all its nodes and releases them one by one. This is a
// template because newer versions of torch have no deleteNode.
template <class Node>
void delete_without_recursion(Node* node) {
  // A pointer, because it must outlive the thread's objects: when a thread ends, torch's queue with
  // the remains of a failed backward may be the last owner of nodes.
  thread_local Tensors* left = nullptr;
  Tensors own;
  const bool is_first = left == nullptr;
  if (is_first) left = &own;
  node->leave_tensors(*left);
  deleteNode(node);
  if (!is_first) return;
  while (!own.empty()) {
    const at::Tensor last = std::move(own.back());
    own.pop_back();
  }
  left = nullptr;
}

// The type of pointer that this version of torch uses for nodes.
using NodePointer = std::decay_t<decltype(std::declval<at::Tensor&>().grad_fn())>;

template <class Pointer = NodePointer>
Pointer make_node(torch::autograd::edge_list edges, WeightNorm::Weights weights, Bucket bucket) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return Pointer(new WeightNorm(std::move(edges), std::move(weights), bucket),
                   delete_without_recursion<WeightNorm>);
  } else {
    return c10::make_intrusive<WeightNorm>(std::move(edges), std::move(weights), bucket);
  }
}

// Computes w and norm of one weight. If nobody asks for norm, it stays undefined.
TensorPair forward_of_one(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                          std::optional<at::ScalarType> out_dtype, Bucket bucket, bool wants_norm) {
  const at::Tensor inputs[] = {v, g};
  const bool records = needs_grad(inputs);
  TensorPair results;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    if (is_direct(v.key_set() | g.key_set()))
      results = forward_on_cpu(v, g, dim, eps, out_dtype);
    else if (records || wants_norm)
      results = forward_one(v, g, dim, eps, out_dtype, bucket);
    else
      std::get<0>(results) = weight_norm(v, g, dim, eps, out_dtype, bucket);
  }
  auto& [w, norm] = results;
  if (records) {
    WeightNorm::Weights weights;
    weights.emplace_back(v, g, norm, dim, eps);
    torch::autograd::set_history(
        w, make_node(torch::autograd::collect_next_edges(v, g), std::move(weights), bucket));
  }
  return results;
}

at::Tensor weight_norm_autograd(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                                std::optional<at::ScalarType> out_dtype, Bucket bucket) {
  const at::Tensor inputs[] = {v, g};
  if (is_transformed(inputs)) return composed::weight_norm(v, g, dim, eps, out_dtype);
  return std::get<0>(forward_of_one(v, g, dim, eps, out_dtype, bucket, /*wants_norm=*/false));
}

TensorPair forward_one_autograd(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                                std::optional<at::ScalarType> out_dtype, Bucket bucket) {
  const at::Tensor inputs[] = {v, g};
  if (is_transformed(inputs)) return composed::forward_one(v, g, dim, eps, out_dtype);
  return forward_of_one(v, g, dim, eps, out_dtype, bucket, /*wants_norm=*/true);
}

// Gives the weights of a launch their node. results has every w, then every norm.
Tensors recorded(Tensors results, at::TensorList v, at::TensorList g, at::IntArrayRef dim,
                 at::ArrayRef<double> eps) {
  if (!at::GradMode::is_enabled()) return results;
  // A weight is no part of the node if neither its v nor its g requires grad.
  const size_t count = v.size();
  Tensors live_w, live_v, live_g;
  WeightNorm::Weights weights;
  for (size_t k = 0; k < count; ++k) {
    if (!v[k].requires_grad() && !g[k].requires_grad()) continue;
    live_w.push_back(results[k]);
    live_v.push_back(v[k]);
    live_g.push_back(g[k]);
    weights.emplace_back(v[k], g[k], results[count + k], dim[k], eps[k]);
  }
  if (live_w.empty()) return results;
  auto edges = torch::autograd::collect_next_edges(live_v, live_g);
  torch::autograd::set_history(live_w,
                               make_node(std::move(edges), std::move(weights), std::nullopt));
  return results;
}

Tensors forward_autograd(at::TensorList v, at::TensorList g, at::IntArrayRef dim,
                         at::ArrayRef<double> eps, std::optional<at::ScalarType> out_dtype) {
  if (is_transformed(v) || is_transformed(g)) return composed::forward(v, g, dim, eps, out_dtype);
  Tensors results;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    results = forward(v, g, dim, eps, out_dtype);
  }
  return recorded(std::move(results), v, g, dim, eps);
}

Tensors forced_autograd(at::TensorList v, at::TensorList g, at::ArrayRef<double> norms,
                        at::IntArrayRef dim, at::ArrayRef<double> eps,
                        std::optional<at::ScalarType> out_dtype) {
  Tensors results;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    results = forced(v, g, norms, dim, eps, out_dtype);
  }
  return recorded(std::move(results), v, g, dim, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(wnkernel, Autograd, m) {
  m.impl("weight_norm", weight_norm_autograd);
  m.impl("forward_one", forward_one_autograd);
  m.impl("backward_one", first_derivative);
  m.impl("forward", forward_autograd);
  m.impl("forced", forced_autograd);
  m.impl("backward", first_derivatives);
}

// Under vmap these operators run as ATen operators that have batching rules, not once per sample.
TORCH_LIBRARY_IMPL(wnkernel, FuncTorchBatched, m) {
  m.impl("weight_norm", composed::weight_norm);
  m.impl("forward_one", composed::forward_one);
  m.impl("backward_one", composed::backward_one);
  m.impl("forward", composed::forward);
  m.impl("backward", composed::backward);
}

// autograd.grad(..., is_grads_batched=True) and vectorized Jacobians use the older vmap.
TORCH_LIBRARY_IMPL(wnkernel, Batched, m) {
  m.impl("backward_one", composed::backward_one);
  m.impl("backward", composed::backward);
}

}  // namespace wnkernel
