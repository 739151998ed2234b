// The operators on tensors of one kind of device: checks -> problem table -> launch. A Device is
// made once for a call, after the checks, and says where results live, which types there are
// kernels for and how they are launched:
//
//   explicit Device(const at::Tensor& v)
//   static at::Tensor empty(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType)
//   static at::Tensor empty_norm(at::IntArrayRef sizes, at::ScalarType)
//   static bool takes(DType v, DType w)
//   void forward(const Forward*, int64_t count)
//   void backward(const Backward*, int64_t count)
#pragma once
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include "ops.h"
#include "problem.h"

namespace wnkernel {

// FSDP takes the memory of a parameter away without telling those who hold it.
inline void check_memory(const char* name, const at::Tensor& t) {
  TORCH_CHECK(t.numel() == 0 || t.storage().nbytes() > 0, name,
              ": expected a tensor with memory, got one of shape ", t.sizes(),
              " whose storage was freed");
}

// v itself where it fills its memory without gaps or repeats, in whatever order; else a copy.
inline at::Tensor dense(const at::Tensor& v) {
  return v.is_non_overlapping_and_dense() ? v : v.contiguous();
}

inline at::Tensor with_type(const at::Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype ? t : t.to(dtype);
}

template <class Device>
at::Tensor empty_like(const at::Tensor& dense, at::ScalarType dtype) {
  return Device::empty(dense.sizes(), dense.strides(), dtype);
}

// t in the memory order of v: itself, or one copy.
template <class Device>
at::Tensor ordered_like(const at::Tensor& t, const at::Tensor& v) {
  if (t.strides() == v.strides()) return t;
  if (t.is_contiguous() && v.is_contiguous()) return t;  // strides of size-1 dims may differ
  at::Tensor ordered = empty_like<Device>(v, t.scalar_type());
  ordered.copy_(t);
  return ordered;
}

// What kernels are given for v and w (or grad_w) of other types: the type of sums for v, which
// holds it without loss, and for w if need be. The caller's types are made of the results, which
// rounds as a kernel would have.
struct Types {
  at::ScalarType v, w;
};

template <class Device>
Types types_of(at::ScalarType v, at::ScalarType w) {
  if (Device::takes(dtype_of(v), dtype_of(w))) return {v, w};
  v = accumulation_dtype(v);
  return {v, Device::takes(dtype_of(v), dtype_of(w)) ? w : v};
}

template <class Device>
std::tuple<Tensors, Tensors> forward_on(at::TensorList v, at::TensorList g, at::IntArrayRef dim,
                                        at::ArrayRef<double> eps,
                                        std::optional<at::ScalarType> out_dtype) {
  const size_t count = v.size();
  check_forward_lengths(v, g, dim, eps);
  for (size_t k = 0; k < count; ++k) {
    check_forward(v[k], g[k], dim[k], eps[k], out_dtype);
    check_memory("v", v[k]);
    check_memory("g", g[k]);
  }
  check_one_device(v);
  if (count == 0) return {};

  Device device(v[0]);
  Tensors w(count), norm(count);
  c10::SmallVector<at::Tensor, 2> alive;  // what the table points into
  alive.reserve(2 * count);               // references to its elements are taken
  c10::SmallVector<Forward, 1> table;
  for (size_t k = 0; k < count; ++k) {
    const auto [v_type, w_type] =
        types_of<Device>(v[k].scalar_type(), out_dtype.value_or(v[k].scalar_type()));
    const at::Tensor& vk = alive.emplace_back(with_type(dense(v[k]), v_type));
    const at::Tensor& gk = alive.emplace_back(g[k].contiguous());
    w[k] = empty_like<Device>(vk, w_type);
    norm[k] = Device::empty_norm(gk.sizes(), accumulation_dtype(v_type));
    if (vk.numel() == 0) {
      norm[k].zero_();
      continue;
    }
    table.push_back({vk.const_data_ptr(), gk.const_data_ptr(), w[k].mutable_data_ptr(),
                     norm[k].mutable_data_ptr(), row_view(vk, dim[k]), dtype_of(v_type),
                     dtype_of(gk.scalar_type()), dtype_of(w_type),
                     dtype_of(divisor_dtype(v[k], gk)), eps[k]});
  }
  device.forward(table.data(), static_cast<int64_t>(table.size()));
  for (size_t k = 0; k < count; ++k) w[k] = with_type(w[k], out_dtype.value_or(v[k].scalar_type()));
  return {std::move(w), std::move(norm)};
}

template <class Device>
std::tuple<Tensors, Tensors> backward_on(at::TensorList grad_w, at::TensorList v, at::TensorList g,
                                         at::TensorList norm, at::IntArrayRef dim,
                                         at::ArrayRef<double> eps, at::IntArrayRef need_v,
                                         at::IntArrayRef need_g) {
  const size_t count = v.size();
  check_backward_lengths(grad_w, v, g, norm, dim, eps, need_v, need_g);
  for (size_t k = 0; k < count; ++k) {
    check_backward(grad_w[k], v[k], g[k], norm[k], dim[k], eps[k]);
    check_memory("grad_w", grad_w[k]);
    check_memory("v", v[k]);
    check_memory("g", g[k]);
  }
  check_one_device(v);
  if (count == 0) return {};

  Device device(v[0]);
  Tensors grad_v, grad_g;
  c10::SmallVector<at::Tensor, 4> alive;
  alive.reserve(4 * count);
  c10::SmallVector<Backward, 1> table;
  for (size_t k = 0; k < count; ++k) {
    if (!need_v[k] && !need_g[k]) continue;
    const auto [v_type, w_type] = types_of<Device>(v[k].scalar_type(), grad_w[k].scalar_type());
    const at::Tensor& vk = alive.emplace_back(with_type(dense(v[k]), v_type));
    const at::Tensor& gk = alive.emplace_back(g[k].contiguous());
    void *to_v = nullptr, *to_g = nullptr;
    if (need_v[k]) to_v = grad_v.emplace_back(empty_like<Device>(vk, v_type)).mutable_data_ptr();
    if (need_g[k])
      to_g = grad_g.emplace_back(empty_like<Device>(gk, gk.scalar_type())).mutable_data_ptr();
    if (vk.numel() == 0) {  // a row of no elements: its norm does not depend on anything
      if (need_g[k]) grad_g.back().zero_();
      continue;
    }
    const at::Tensor& grad =
        alive.emplace_back(with_type(ordered_like<Device>(grad_w[k], vk), w_type));
    const at::Tensor& norms = alive.emplace_back(norm[k].contiguous());
    table.push_back({grad.const_data_ptr(), vk.const_data_ptr(), gk.const_data_ptr(),
                     norms.const_data_ptr(), to_v, to_g, row_view(vk, dim[k]), dtype_of(v_type),
                     dtype_of(gk.scalar_type()), dtype_of(w_type), eps[k]});
  }
  device.backward(table.data(), static_cast<int64_t>(table.size()));
  auto grad = grad_v.begin();
  for (size_t k = 0; k < count; ++k)
    if (need_v[k]) {
      *grad = with_type(*grad, v[k].scalar_type());
      ++grad;
    }
  return {std::move(grad_v), std::move(grad_g)};
}

template <class Device>
at::Tensor weight_norm_on(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                          std::optional<at::ScalarType> out_dtype) {
  return std::get<0>(forward_on<Device>(v, g, dim, eps, out_dtype))[0];
}

}  // namespace wnkernel
