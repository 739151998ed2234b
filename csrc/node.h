// The autograd node of the weight norms of one launch.
#pragma once
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/function.h>
#include <torch/version.h>

#include <string>
#include <utility>

#include "ops.h"
#include "saved.h"

// Since torch 2.7 compiled autograd puts calls of functions into its graphs; before, it traced
// apply() with other tensors in the place of those that a node holds.
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 7
#define WNKERNEL_FUNCTIONAL_NODES 1
#define WNKERNEL_COMPILED_ARGS_CONST const
#else
#define WNKERNEL_FUNCTIONAL_NODES 0
#define WNKERNEL_COMPILED_ARGS_CONST
#endif

namespace wnkernel {

// Its inputs are every v, then every g; it has an output for each weight, in the same order.
class WeightNorm final : public torch::autograd::Node {
 public:
  using Weights = c10::SmallVector<Saved, 1>;
  using Needs = c10::SmallVector<int64_t, 2>;  // 0 or 1 for every v, then for every g
  using variable_list = torch::autograd::variable_list;

  // Only weights of which v or g requires grad.
  WeightNorm(torch::autograd::edge_list edges, Weights weights, Bucket bucket)
      : Node(std::move(edges)), weights_(std::move(weights)), bucket_(bucket) {}

  std::string name() const override { return "WeightNormBackward"; }

  // Weights that nothing was computed from get no gradient.
  variable_list apply(variable_list&& grad_w) override;

  // For what deletes this node: its tensors outlive it in `there`.
  void leave_tensors(Tensors& there) {
    for (Saved& w : weights_)
      for (at::Tensor* t : {&w.v, &w.g, &w.extra}) there.push_back(std::move(*t));
  }

  // Compiled autograd makes a graph of the node: what that depends on, and the graph.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args)
      WNKERNEL_COMPILED_ARGS_CONST override;
  variable_list apply_with_saved(const variable_list& grad_w,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override;

 private:
  Needs needs() const;

  // Throws if a weight that a gradient is needed of was written to since the forward.
  void check_versions(const Needs& needs) const;

  // The weights, with what compiled autograd puts in the place of their tensors.
  Weights swapped(torch::dynamo::autograd::SwapSavedVariables& saved);

  Weights weights_;
  const Bucket bucket_;
};

}  // namespace wnkernel
