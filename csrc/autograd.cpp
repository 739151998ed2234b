// Autograd under the dispatcher: one node for a list of weight norms, and a cheaper one for a
// single weight, whose backward is again a differentiable operator.
//
// Nothing goes through save_for_backward: v, g and norm live in the node, and their versions are
// compared here. So a node may run backward any number of times, and activation checkpointing,
// which counts saved tensors, sees none of it. Outputs are never kept: that would be a reference
// cycle.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "composed.h"
#include "ops.h"
#include "problem.h"

namespace wnkernel {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check_version(const char* name, const at::Tensor& t, int64_t expected) {
  TORCH_CHECK(version_of(t) == expected,
              "one of the variables needed for gradient computation has been modified by an "
              "inplace operation: ",
              name, " of shape ", t.sym_sizes(), " of a weight norm is at version ", version_of(t),
              "; expected version ", expected, " instead");
}

bool needs_grad(at::TensorList tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const at::Tensor& t : tensors)
    if (t.requires_grad()) return true;
  return false;
}

// Function transforms and forward-mode AD, which no C++ node supports.
bool is_transformed(at::TensorList tensors) {
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode))
    return true;
  for (const at::Tensor& t : tensors)
    if (t._fw_grad(/*level=*/0).defined()) return true;
  return false;
}

// Whether nobody waits between autograd and the CPU kernels, so that one weight need not go through
// the dispatcher again: no mode, no tracer, no profiler, and tensors that are memory and no more.
// (An observer that samples is asked twice, here and by the dispatcher.)
bool is_direct(c10::DispatchKeySet tensors) {
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet above =  // that have no kernels of this library
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset |
      c10::DispatchKeySet(c10::DispatchKey::BackendSelect);
  const c10::DispatchKeySet left = (tensors | local.included_) - local.excluded_ - above;
  return left.highestPriorityTypeId() == c10::DispatchKey::CPU &&
         !at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
}

// What a node keeps of one weight.
struct Saved {
  Saved(const at::Tensor& v, const at::Tensor& g, const at::Tensor& extra, int64_t dim, double eps)
      : v(v),
        g(g),
        extra(extra),
        dim(dim),
        eps(eps),
        v_version(version_of(v)),
        g_version(version_of(g)),
        extra_version(version_of(extra)) {}

  at::Tensor v, g, extra;  // extra: norm, or grad_w
  int64_t dim;
  double eps;
  int64_t v_version, g_version, extra_version;

  void check_versions(const char* extra_name) const {
    check_version("v", v, v_version);
    check_version("g", g, g_version);
    check_version(extra_name, extra, extra_version);
  }
};

// What a node keeps: one entry of saved_data, since each costs a hash of its name.
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

// The first derivative as a differentiable operation.
// Inputs: grad_w, v, g of every problem. Outputs: wanted grad_v, then wanted grad_g.
struct FirstDerivative : torch::autograd::Function<FirstDerivative> {
  static variable_list forward(AutogradContext* ctx, at::TensorList grad_w, at::TensorList v,
                               at::TensorList g, at::TensorList norm, at::IntArrayRef dim,
                               at::ArrayRef<double> eps, at::IntArrayRef need_v,
                               at::IntArrayRef need_g) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [grads, grad_g] = wnkernel::backward(grad_w, v, g, norm, dim, eps, need_v, need_g);
    SavedWeights::store(ctx, v, g, grad_w, dim, eps);  // the operator has checked the lists
    ctx->saved_data["need_v"] = need_v;
    ctx->saved_data["need_g"] = need_g;
    ctx->set_materialize_grads(false);
    grads.insert(grads.end(), grad_g.begin(), grad_g.end());
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

std::tuple<Tensors, Tensors> first_derivatives(at::TensorList grad_w, at::TensorList v,
                                               at::TensorList g, at::TensorList norm,
                                               at::IntArrayRef dim, at::ArrayRef<double> eps,
                                               at::IntArrayRef need_v, at::IntArrayRef need_g) {
  if (is_transformed(grad_w) || is_transformed(v) || is_transformed(g))
    return composed::backward(grad_w, v, g, norm, dim, eps, need_v, need_g);
  if (!needs_grad(grad_w) && !needs_grad(v) && !needs_grad(g)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return backward(grad_w, v, g, norm, dim, eps, need_v, need_g);
  }
  const Tensors grads = FirstDerivative::apply(grad_w, v, g, norm, dim, eps, need_v, need_g);
  const auto wanted_v = std::count_if(need_v.begin(), need_v.end(), [](int64_t n) { return n; });
  return {Tensors(grads.begin(), grads.begin() + wanted_v),
          Tensors(grads.begin() + wanted_v, grads.end())};
}

struct WeightNorms : torch::autograd::Function<WeightNorms> {
  static variable_list forward(AutogradContext* ctx, at::TensorList v, at::TensorList g,
                               at::IntArrayRef dim, at::ArrayRef<double> eps,
                               std::optional<at::ScalarType> out_dtype, Tensors* norms) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [w, norm] = wnkernel::forward(v, g, dim, eps, out_dtype);
    SavedWeights::store(ctx, v, g, norm, dim, eps);
    ctx->set_materialize_grads(false);
    mark_frozen(ctx, v, g, w);
    *norms = std::move(norm);
    return std::move(w);
  }

  // Weights of which neither v nor g wants a gradient: nothing is to be computed for them.
  static void mark_frozen(AutogradContext* ctx, at::TensorList v, at::TensorList g,
                          const Tensors& w) {
    variable_list frozen;
    for (size_t k = 0; k < w.size(); ++k)
      if (!v[k].requires_grad() && !g[k].requires_grad()) frozen.push_back(w[k]);
    if (!frozen.empty()) ctx->mark_non_differentiable(frozen);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_w) {
    const at::ArrayRef<Saved> saved = SavedWeights::load(ctx);
    const size_t count = grad_w.size();

    // Weights that nothing was computed from are left out: their gradients stay None.
    c10::SmallVector<at::Tensor, 1> grad, v, g, norm;
    c10::SmallVector<int64_t, 1> dim, need_v, need_g;
    c10::SmallVector<double, 1> eps;
    c10::SmallVector<size_t, 1> live;
    for (size_t k = 0; k < count; ++k) {
      const bool wants_v = ctx->needs_input_grad(k), wants_g = ctx->needs_input_grad(count + k);
      if (!grad_w[k].defined() || !(wants_v || wants_g)) continue;
      const Saved& w = saved[k];
      w.check_versions("norm");
      live.push_back(k);
      grad.push_back(grad_w[k]);
      v.push_back(w.v);
      g.push_back(w.g);
      norm.push_back(w.extra);
      dim.push_back(w.dim);
      eps.push_back(w.eps);
      need_v.push_back(wants_v);
      need_g.push_back(wants_g);
    }
    variable_list grads(2 * count + 4);
    if (live.empty()) return grads;
    auto [grad_v, grad_g] = first_derivatives(grad, v, g, norm, dim, eps, need_v, need_g);
    size_t next_v = 0, next_g = 0;
    for (size_t j = 0; j < live.size(); ++j) {
      if (need_v[j]) grads[live[j]] = std::move(grad_v[next_v++]);
      if (need_g[j]) grads[count + live[j]] = std::move(grad_g[next_g++]);
    }
    return grads;
  }
};

// The node of one weight norm, without what lists and the recording of their arguments cost.
class WeightNorm final : public torch::autograd::Node {
 public:
  WeightNorm(const at::Tensor& v, const at::Tensor& g, const at::Tensor& norm, int64_t dim,
             double eps)
      : Node(torch::autograd::collect_next_edges(v, g)), weight_(v, g, norm, dim, eps) {}

  std::string name() const override { return "WeightNormBackward"; }

  variable_list apply(variable_list&& grads) override {
    const at::Tensor& grad_w = grads[0];
    const Saved& w = weight_;
    const bool need_v = task_should_compute_output(0), need_g = task_should_compute_output(1);
    if (!grad_w.defined() || !(need_v || need_g)) return variable_list(2);
    w.check_versions("norm");
    const at::Tensor inputs[] = {grad_w, w.v, w.g};
    const auto keys = grad_w.key_set() | w.v.key_set() | w.g.key_set() | w.extra.key_set();
    if (is_direct(keys) && !is_transformed(inputs) && !needs_grad(inputs)) {
      at::AutoDispatchBelowADInplaceOrView below;
      auto [grad_v, grad_g] =
          backward_on_cpu(grad_w, w.v, w.g, w.extra, w.dim, w.eps, need_v, need_g);
      return {std::move(grad_v), std::move(grad_g)};
    }
    const int64_t wanted[] = {need_v, need_g};
    auto [grad_v, grad_g] =
        first_derivatives(grad_w, w.v, w.g, w.extra, w.dim, w.eps, at::IntArrayRef(wanted[0]),
                          at::IntArrayRef(wanted[1]));
    variable_list found(2);
    if (need_v) found[0] = std::move(grad_v[0]);
    if (need_g) found[1] = std::move(grad_g[0]);
    return found;
  }

 private:
  const Saved weight_;
};

// The pointer that this version of torch has for nodes.
using NodePointer = std::decay_t<decltype(std::declval<at::Tensor&>().grad_fn())>;

template <class Pointer = NodePointer>
Pointer make_node(const at::Tensor& v, const at::Tensor& g, const at::Tensor& norm, int64_t dim,
                  double eps) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    const auto end = [](auto* node) { deleteNode(node); };  // of torch, without recursion
    return Pointer(new WeightNorm(v, g, norm, dim, eps), end);
  } else {
    return c10::make_intrusive<WeightNorm>(v, g, norm, dim, eps);
  }
}

at::Tensor weight_norm_autograd(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                                std::optional<at::ScalarType> out_dtype) {
  const at::Tensor inputs[] = {v, g};
  if (is_transformed(inputs)) return composed::weight_norm(v, g, dim, eps, out_dtype);
  const bool records = needs_grad(inputs);
  std::pair<at::Tensor, at::Tensor> w_norm;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    if (is_direct(v.key_set() | g.key_set())) {
      w_norm = forward_on_cpu(v, g, dim, eps, out_dtype);
    } else if (!records) {
      return weight_norm(v, g, dim, eps, out_dtype);
    } else {
      auto [w, norm] = forward(v, g, dim, eps, out_dtype);
      w_norm = {std::move(w[0]), std::move(norm[0])};
    }
  }
  auto& [w, norm] = w_norm;
  if (records) torch::autograd::set_history(w, make_node(v, g, norm, dim, eps));
  return w;
}

std::tuple<Tensors, Tensors> forward_autograd(at::TensorList v, at::TensorList g,
                                              at::IntArrayRef dim, at::ArrayRef<double> eps,
                                              std::optional<at::ScalarType> out_dtype) {
  if (is_transformed(v) || is_transformed(g)) return composed::forward(v, g, dim, eps, out_dtype);
  if (needs_grad(v) || needs_grad(g)) {
    Tensors norms;
    Tensors w = WeightNorms::apply(v, g, dim, eps, out_dtype, &norms);
    return {std::move(w), std::move(norms)};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return forward(v, g, dim, eps, out_dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(wnkernel, Autograd, m) {
  m.impl("weight_norm", weight_norm_autograd);
  m.impl("forward", forward_autograd);
  m.impl("backward", first_derivatives);
}

// vmap: in operators that have batching rules, rather than one by one.
TORCH_LIBRARY_IMPL(wnkernel, FuncTorchBatched, m) {
  m.impl("weight_norm", composed::weight_norm);
  m.impl("forward", composed::forward);
  m.impl("backward", composed::backward);
}

// The older vmap, which autograd.grad(..., is_grads_batched=True) and vectorized Jacobians use.
TORCH_LIBRARY_IMPL(wnkernel, Batched, m) { m.impl("backward", composed::backward); }

}  // namespace wnkernel
