#include "node.h"

#include <torch/csrc/dynamo/compiled_autograd.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "autograd.h"

namespace wnkernel {

using Needs = WeightNorm::Needs;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;

namespace {

// Sparse gradients, such as those of an embedding, are made dense, because the projection reads
// every element.
bool is_dense(const at::Tensor& grad_w) { return grad_w.layout() == at::kStrided; }

variable_list gradients_of_one(const at::Tensor& grad_w, const Saved& w, bool need_v, bool need_g,
                               Bucket bucket) {
  if (!is_dense(grad_w)) return gradients_of_one(grad_w.to_dense(), w, need_v, need_g, bucket);
  const at::Tensor inputs[] = {grad_w, w.v, w.g};
  const auto keys = grad_w.key_set() | w.v.key_set() | w.g.key_set() | w.extra.key_set();
  if (is_direct(keys) && !is_transformed(inputs) && !needs_grad(inputs)) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [grad_v, grad_g] =
        backward_on_cpu(grad_w, w.v, w.g, w.extra, w.dim, w.eps, need_v, need_g);
    return {std::move(grad_v), std::move(grad_g)};
  }
  auto [grad_v, grad_g] =
      first_derivative(grad_w, w.v, w.g, w.extra, w.dim, w.eps, need_v, need_g, bucket);
  variable_list grads(2);
  if (need_v) grads[0] = std::move(grad_v);
  if (need_g) grads[1] = std::move(grad_g);
  return grads;
}

variable_list gradients_of_list(const variable_list& grad_w, at::ArrayRef<Saved> weights,
                                const Needs& needs) {
  const size_t count = weights.size();
  std::vector<at::Tensor> grad, v, g, norm;
  std::vector<int64_t> dim, need_v, need_g;
  std::vector<double> eps;
  for (size_t k = 0; k < count; ++k) {
    if (!grad_w[k].defined() || !(needs[k] || needs[count + k])) continue;
    const Saved& w = weights[k];
    grad.push_back(is_dense(grad_w[k]) ? grad_w[k] : grad_w[k].to_dense());
    v.push_back(w.v);
    g.push_back(w.g);
    norm.push_back(w.extra);
    dim.push_back(w.dim);
    eps.push_back(w.eps);
    need_v.push_back(needs[k]);
    need_g.push_back(needs[count + k]);
  }
  variable_list found(2 * count);
  if (grad.empty()) return found;
  Tensors grads = first_derivatives(grad, v, g, norm, dim, eps, need_v, need_g);
  auto next = grads.begin();
  for (size_t k = 0; k < 2 * count; ++k)
    if (needs[k] && grad_w[k % count].defined()) found[k] = std::move(*next++);
  return found;
}

variable_list gradients(const variable_list& grad_w, at::ArrayRef<Saved> weights,
                        const Needs& needs, Bucket bucket) {
  if (weights.size() > 1) return gradients_of_list(grad_w, weights, needs);
  if (!grad_w[0].defined() || !(needs[0] || needs[1])) return variable_list(2);
  return gradients_of_one(grad_w[0], weights[0], needs[0], needs[1], bucket);
}

}  // namespace

variable_list WeightNorm::apply(variable_list&& grad_w) {
  const size_t count = weights_.size();
  Needs needs = this->needs();
  for (size_t k = 0; k < count; ++k)
    if (!grad_w[k].defined()) needs[k] = needs[count + k] = 0;
  check_versions(needs);
  return gradients(grad_w, weights_, needs, bucket_);
}

WeightNorm::Needs WeightNorm::needs() const {
  Needs needs(2 * weights_.size());
  for (size_t k = 0; k < needs.size(); ++k) needs[k] = task_should_compute_output(k);
  return needs;
}

void WeightNorm::check_versions(const Needs& needs) const {
  const size_t count = weights_.size();
  for (size_t k = 0; k < count; ++k)
    if (needs[k] || needs[count + k]) weights_[k].check_versions("norm");
}

// Compiled autograd calls this in every backward. Its graph replaces the tensors, so later checks
// could not see that a tensor was written to. So all weights are checked here, even those without a
// needed gradient.
void WeightNorm::compiled_args(CompiledNodeArgs& args) WNKERNEL_COMPILED_ARGS_CONST {
  check_versions(needs());
  args.collect(name());
  args.collect(static_cast<int64_t>(weights_.size()));
  for (const Saved& w : weights_) {
    for (const at::Tensor* t : {&w.v, &w.g, &w.extra}) args.collect(*t);
    args.collect(w.dim);
    args.collect(w.eps);
  }
  for (const int64_t need : needs()) args.collect(need);
  args.collect(bucket_.value_or(-1));
}

WeightNorm::Weights WeightNorm::swapped(SwapSavedVariables& saved) {
  const auto swap = [&](at::Tensor& t) {
    saved.before(t);
    at::Tensor other = t;
    saved.after(t);
    return other;
  };
  Weights weights;
  for (Saved& w : weights_) weights.emplace_back(swap(w.v), swap(w.g), swap(w.extra), w.dim, w.eps);
  return weights;
}

#if WNKERNEL_FUNCTIONAL_NODES
namespace {

// Compiled autograd calls this in place of apply().
variable_list traced_gradients(const variable_list& grad_w, const std::vector<c10::IValue>& args) {
  const std::vector<at::Tensor> tensors = args[0].toTensorVector();
  const std::vector<int64_t> dims = args[1].toIntVector(), needs = args[2].toIntVector();
  const std::vector<double> eps = args[3].toDoubleVector();
  const int64_t bucket = args[4].toInt();
  WeightNorm::Weights weights;
  for (size_t k = 0; k < dims.size(); ++k)
    weights.emplace_back(tensors[3 * k], tensors[3 * k + 1], tensors[3 * k + 2], dims[k], eps[k]);
  return gradients(grad_w, weights, Needs(needs.begin(), needs.end()),
                   bucket < 0 ? Bucket() : Bucket(bucket));
}

}  // namespace

variable_list WeightNorm::apply_with_saved(const variable_list& grad_w, SwapSavedVariables& saved) {
  using namespace torch::dynamo::autograd;
  std::vector<at::Tensor> tensors;
  std::vector<int64_t> dims;
  std::vector<double> eps;
  for (const Saved& w : swapped(saved)) {
    tensors.insert(tensors.end(), {w.v, w.g, w.extra});
    dims.push_back(w.dim);
    eps.push_back(w.eps);
  }
  const Needs needs = this->needs();
  const std::vector<c10::IValue> args = {
      tensors, dims, std::vector<int64_t>(needs.begin(), needs.end()), eps, bucket_.value_or(-1)};
  std::vector<at::TypePtr> types;
  for (const c10::IValue& x : args) types.push_back(x.type());
  const auto metadata = IValuePacker<std::vector<std::optional<InputMetadata>>>::pack(
      get_input_metadata(next_edges()));
  const auto& compiler = getPyCompilerInterface();
  const std::string function =
      compiler->bind_function(saved.get_py_compiler(), name(), traced_gradients, types,
                              /*is_custom_function=*/true, /*is_traceable=*/true);
  return compiler->call_function(saved.get_py_compiler(), "apply_functional", function, grad_w,
                                 args, metadata);
}
#else
variable_list WeightNorm::apply_with_saved(const variable_list& grad_w, SwapSavedVariables& saved) {
  return gradients(grad_w, swapped(saved), needs(), bucket_);
}
#endif

}  // namespace wnkernel
