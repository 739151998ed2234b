// The autograd node of the weight norms of one launch.
#pragma once
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/function.h>
#include <torch/version.h>

#include <string>
#include <utility>

#include "ops.h"
#include "saved.h"

// From torch 2.7 on, compiled autograd puts calls of functions into its graphs. Older versions
// trace apply() with other tensors in place of those that a node holds.
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 7
#define WNKERNEL_FUNCTIONAL_NODES 1
#define WNKERNEL_COMPILED_ARGS_CONST const
#else
#define WNKERNEL_FUNCTIONAL_NODES 0
#define WNKERNEL_COMPILED_ARGS_CONST
#endif

namespace wnkernel {

// The inputs of the node are every v, then every g. It has one output per weight, in the same
// order.
class WeightNorm final : public torch::autograd::Node {
 public:
  using Weights = c10::SmallVector<Saved, 1>;
  using Needs = c10::SmallVector<int64_t, 2>;  // 0 or 1 for every v, then for every g
  using variable_list = torch::autograd::variable_list;

  // Takes only weights whose v or g requires grad.
  WeightNorm(torch::autograd::edge_list edges, Weights weights, Bucket bucket)
      : Node(std::move(edges)), weights_(std::move(weights)), bucket_(bucket) {}

  std::string name() const override { return "WeightNormBackward"; }

  // A weight gets no gradient if nothing was computed from it.
  variable_list apply(variable_list&& grad_w) override;

  // Moves the tensors of this node into `there`, so that they outlive the node when it is deleted.
  void leave_tensors(Tensors& there) {
    for (Saved& w : weights_)
      for (at::Tensor* t : {&w.v, &w.g, &w.extra}) there.push_back(std::move(*t));
  }

  // Compiled autograd calls compiled_args() for what its graph of the node depends on, and
  // apply_with_saved() for the graph.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args)
      WNKERNEL_COMPILED_ARGS_CONST override;
  variable_list apply_with_saved(const variable_list& grad_w,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override;

 private:
  Needs needs() const;

  // Throws if a weight that needs a gradient was written to after the forward.
  void check_versions(const Needs& needs) const;

  // The weights, with the tensors that compiled autograd puts in place of theirs.
  Weights swapped(torch::dynamo::autograd::SwapSavedVariables& saved);

  Weights weights_;
  const Bucket bucket_;
};

}  // namespace wnkernel
