// The tensors of one weight that its backward reads, and their versions.
//
// They do not go through save_for_backward: the node holds v, g and norm, and compares their
// versions here. So a node can run backward any number of times, and activation checkpointing,
// which counts saved tensors, sees none of them. A node never holds its outputs, because that would
// be a reference cycle.
#pragma once
#include <ATen/core/Tensor.h>

#include "problem.h"

namespace wnkernel {

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

  at::Tensor v, g, extra;  // extra is norm, or grad_w
  int64_t dim;
  double eps;
  int64_t v_version, g_version, extra_version;

  // Throws if one of the tensors was written to since.
  void check_versions(const char* extra_name) const {
    check_version("v", v, v_version);
    check_version("g", g, g_version);
    check_version(extra_name, extra, extra_version);
  }

 private:
  static void check_version(const char* name, const at::Tensor& t, int64_t expected) {
    TORCH_CHECK(version_of(t) == expected,
                "one of the variables needed for gradient computation has been modified by an "
                "inplace operation: ",
                name, " of shape ", t.sym_sizes(), " of a weight norm is at version ",
                version_of(t), "; expected version ", expected, " instead");
  }
};

}  // namespace wnkernel
