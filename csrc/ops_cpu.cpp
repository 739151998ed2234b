// Operators on CPU tensors: checks -> problem table -> launch.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include "cpu_buffers.h"
#include "ops.h"
#include "problem.h"

namespace wnkernel {
namespace {

Threads threads() {
  return {at::get_num_threads(), [](int tasks, void (*body)(void*, int), void* context) {
            at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t k = begin; k < end; ++k) body(context, static_cast<int>(k));
            });
          }};
}

// FSDP takes the memory of a parameter away without telling those who hold it.
void check_memory(const char* name, const at::Tensor& t) {
  TORCH_CHECK(t.numel() == 0 || t.storage().nbytes() > 0, name,
              ": expected a tensor with memory, got one of shape ", t.sizes(),
              " whose storage was freed");
}

// v itself where it fills its memory without gaps or repeats, in whatever order; else a copy.
at::Tensor dense(const at::Tensor& v) {
  return v.is_non_overlapping_and_dense() ? v : v.contiguous();
}

at::Tensor empty_like(const at::Tensor& dense, at::ScalarType dtype) {
  return at::detail::empty_strided_generic(dense.sizes(), dense.strides(), cpu_buffers(),
                                           c10::DispatchKeySet(c10::DispatchKey::CPU), dtype);
}

// t in the memory order of v: itself, or one copy.
at::Tensor ordered_like(const at::Tensor& t, const at::Tensor& v) {
  if (t.strides() == v.strides()) return t;
  if (t.is_contiguous() && v.is_contiguous()) return t;  // strides of size-1 dims may differ
  at::Tensor ordered = empty_like(v, t.scalar_type());
  ordered.copy_(t);
  return ordered;
}

std::tuple<Tensors, Tensors> forward_on_cpu(at::TensorList v, at::TensorList g, at::IntArrayRef dim,
                                            at::ArrayRef<double> eps,
                                            std::optional<at::ScalarType> out_dtype) {
  const size_t count = v.size();
  check_forward_lengths(v, g, dim, eps);
  for (size_t k = 0; k < count; ++k) {
    check_forward(v[k], g[k], dim[k], eps[k], out_dtype);
    check_memory("v", v[k]);
    check_memory("g", g[k]);
  }

  Tensors w(count), norm(count);
  c10::SmallVector<at::Tensor, 2> alive;  // what the table points into
  alive.reserve(2 * count);               // references to its elements are taken
  c10::SmallVector<Forward, 1> table;
  for (size_t k = 0; k < count; ++k) {
    const at::Tensor& vk = alive.emplace_back(dense(v[k]));
    const at::Tensor& gk = alive.emplace_back(g[k].contiguous());
    w[k] = empty_like(vk, out_dtype.value_or(vk.scalar_type()));
    norm[k] = at::detail::empty_cpu(gk.sizes(), accumulation_dtype(vk.scalar_type()));
    if (vk.numel() == 0) {
      norm[k].zero_();
      continue;
    }
    table.push_back({vk.const_data_ptr(), gk.const_data_ptr(), w[k].mutable_data_ptr(),
                     norm[k].mutable_data_ptr(), row_view(vk, dim[k]), dtype_of(vk), dtype_of(gk),
                     dtype_of(w[k]), eps[k]});
  }
  forward_cpu(table.data(), static_cast<int64_t>(table.size()), threads());
  return {std::move(w), std::move(norm)};
}

std::tuple<Tensors, Tensors> backward_on_cpu(at::TensorList grad_w, at::TensorList v,
                                             at::TensorList g, at::TensorList norm,
                                             at::IntArrayRef dim, at::ArrayRef<double> eps,
                                             at::IntArrayRef need_v, at::IntArrayRef need_g) {
  const size_t count = v.size();
  check_backward_lengths(grad_w, v, g, norm, dim, eps, need_v, need_g);
  for (size_t k = 0; k < count; ++k) {
    check_backward(grad_w[k], v[k], g[k], norm[k], dim[k], eps[k]);
    check_memory("grad_w", grad_w[k]);
    check_memory("v", v[k]);
    check_memory("g", g[k]);
  }

  Tensors grad_v, grad_g;
  c10::SmallVector<at::Tensor, 4> alive;
  alive.reserve(4 * count);
  c10::SmallVector<Backward, 1> table;
  for (size_t k = 0; k < count; ++k) {
    if (!need_v[k] && !need_g[k]) continue;
    const at::Tensor& vk = alive.emplace_back(dense(v[k]));
    const at::Tensor& gk = alive.emplace_back(g[k].contiguous());
    void *to_v = nullptr, *to_g = nullptr;
    if (need_v[k]) to_v = grad_v.emplace_back(empty_like(vk, vk.scalar_type())).mutable_data_ptr();
    if (need_g[k]) to_g = grad_g.emplace_back(empty_like(gk, gk.scalar_type())).mutable_data_ptr();
    if (vk.numel() == 0) {  // a row of no elements: its norm does not depend on anything
      if (need_g[k]) grad_g.back().zero_();
      continue;
    }
    const at::Tensor& grad = alive.emplace_back(ordered_like(grad_w[k], vk));
    const at::Tensor& norms = alive.emplace_back(norm[k].contiguous());
    table.push_back({grad.const_data_ptr(), vk.const_data_ptr(), gk.const_data_ptr(),
                     norms.const_data_ptr(), to_v, to_g, row_view(vk, dim[k]), dtype_of(vk),
                     dtype_of(gk), dtype_of(grad), eps[k]});
  }
  backward_cpu(table.data(), static_cast<int64_t>(table.size()), threads());
  return {std::move(grad_v), std::move(grad_g)};
}

at::Tensor weight_norm_on_cpu(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                              std::optional<at::ScalarType> out_dtype) {
  return std::get<0>(forward_on_cpu(v, g, dim, eps, out_dtype))[0];
}

}  // namespace

TORCH_LIBRARY_IMPL(wnkernel, CPU, m) {
  m.impl("weight_norm", weight_norm_on_cpu);
  m.impl("forward", forward_on_cpu);
  m.impl("backward", backward_on_cpu);
}

}  // namespace wnkernel
