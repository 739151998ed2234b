// The operators on tensors of one kind of device: checks -> problem table -> launch. Every call
// makes one Device after the checks. It says where results live, which types have kernels and how
// kernels are launched:
//
//   explicit Device(const at::Tensor& v)
//   static at::Tensor empty(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType,
//                           std::initializer_list<const at::Tensor*> apart_from)
//   static at::Tensor empty_norm(at::IntArrayRef sizes, at::ScalarType)
//   static bool takes(DType v, DType w)
//   void forward(const Forward*, int64_t count)
//   void backward(const Backward*, int64_t count)
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <initializer_list>
#include <tuple>
#include <utility>
#include <vector>

#include "ops.h"
#include "problem.h"

namespace wnkernel {

// FSDP frees the memory of a parameter without telling the owners of the tensor.
inline void check_memory(const char* name, const at::Tensor& t) {
  TORCH_CHECK(t.numel() == 0 || t.storage().nbytes() > 0, name,
              ": expected a tensor with memory, got one of shape ", t.sizes(),
              " whose storage was freed");
}

// v itself if it fills its memory without gaps or repeats, in any order of dims; else a contiguous
// copy.
inline at::Tensor dense(const at::Tensor& v) {
  return v.is_non_overlapping_and_dense() ? v : v.contiguous();
}

// Memory with the layout of a dense tensor. A kernel reads the tensors in apart_from while it
// writes there.
template <class Device>
at::Tensor empty_like(const at::Tensor& dense, at::ScalarType dtype,
                      std::initializer_list<const at::Tensor*> apart_from = {}) {
  return Device::empty(dense.sizes(), dense.strides(), dtype, apart_from);
}

// t in a dtype and in the memory order of v, which is dense: t itself, or one copy.
template <class Device>
at::Tensor ordered_like(const at::Tensor& t, const at::Tensor& v, at::ScalarType dtype) {
  const bool is_ordered =  // strides of dims of size 1 may differ
      t.strides() == v.strides() || (t.is_contiguous() && v.is_contiguous());
  if (is_ordered && t.scalar_type() == dtype) return t;
  at::Tensor ordered = empty_like<Device>(v, dtype);
  ordered.copy_(t);
  return ordered;
}

// A dense tensor in a dtype: the tensor itself, or a copy. Doubles become halves by way of float,
// as in the kernels: torch's direct conversion makes NaNs whose bits depend on the number of
// threads.
template <class Device>
at::Tensor with_type(at::Tensor t, at::ScalarType dtype) {
  if (t.scalar_type() == at::kDouble && (dtype == at::kHalf || dtype == at::kBFloat16))
    t = ordered_like<Device>(t, t, at::kFloat);
  return ordered_like<Device>(t, t, dtype);
}

// The types that kernels get for types of v and w (or grad_w) without kernels. v gets the type of
// sums, which represents it exactly; w gets it only if necessary. The results are then converted to
// the caller's types, which rounds as a kernel would.
struct Types {
  at::ScalarType v, w;
};

template <class Device>
Types types_of(at::ScalarType v, at::ScalarType w) {
  if (Device::takes(dtype_of(v), dtype_of(w))) return {v, w};
  v = accumulation_dtype(v);
  return {v, Device::takes(dtype_of(v), dtype_of(w)) ? w : v};
}

// The eps of a launch that writes over v: a row of zeros stays, because the least bound, which is
// below every other norm, replaces a bound of 0.
inline double least_eps(double eps, at::ScalarType acc) {
  return eps == 0.0 ? acc == at::kDouble ? 0x1p-1074 : 0x1p-149 : eps;
}

// One weight of a forward: its arguments as kernels take them, its results, and its line of the
// problem table, which points into both. The caller checks the arguments first. The new v of a
// forced weight is in v, which may be a copy.
template <class Device>
struct ForwardWeight {
  at::Tensor v, g, w, norm;
  Forward line{};

  ForwardWeight(const at::Tensor& v_, const at::Tensor& g_, int64_t dim, double eps,
                std::optional<at::ScalarType> out_dtype, double forced = 0) {
    const auto [v_type, w_type] =
        types_of<Device>(v_.scalar_type(), out_dtype.value_or(v_.scalar_type()));
    v = with_type<Device>(dense(v_), v_type);
    g = g_.contiguous();
    w = empty_like<Device>(v, w_type, {&v});
    norm = Device::empty_norm(g.sizes(), accumulation_dtype(v_type));
    if (is_empty()) {
      norm.zero_();
      return;
    }
    const at::ScalarType acc = accumulation_dtype(v_type);
    line = {forced > 0 ? v.mutable_data_ptr() : v.const_data_ptr(),
            g.const_data_ptr(),
            w.mutable_data_ptr(),
            norm.mutable_data_ptr(),
            row_view(v, dim),
            dtype_of(v_type),
            dtype_of(g.scalar_type()),
            dtype_of(w_type),
            dtype_of(forced > 0 ? acc : divisor_dtype(v_, g)),
            forced > 0 ? least_eps(eps, acc) : eps,
            forced};
  }

  bool is_empty() const { return v.numel() == 0; }
};

inline void check_forward_weight(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                                 std::optional<at::ScalarType> out_dtype) {
  check_forward(v, g, dim, eps, out_dtype);
  check_memory("v", v);
  check_memory("g", g);
}

// Computes w and norm of one weight.
template <class Device>
TensorPair forward_one_on(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                          std::optional<at::ScalarType> out_dtype, Bucket = std::nullopt) {
  check_forward_weight(v, g, dim, eps, out_dtype);
  Device device(v);
  ForwardWeight<Device> weight(v, g, dim, eps, out_dtype);
  if (!weight.is_empty()) device.forward(&weight.line, 1);
  return {with_type<Device>(std::move(weight.w), out_dtype.value_or(v.scalar_type())),
          std::move(weight.norm)};
}

template <class Device>
at::Tensor weight_norm_on(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                          std::optional<at::ScalarType> out_dtype, Bucket) {
  return std::get<0>(forward_one_on<Device>(v, g, dim, eps, out_dtype));
}

// forced has a number for each weight, or none.
template <class Device>
Tensors forward_list(at::TensorList v, at::TensorList g, at::ArrayRef<double> forced,
                     at::IntArrayRef dim, at::ArrayRef<double> eps,
                     std::optional<at::ScalarType> out_dtype) {
  const size_t count = v.size();
  check_forward_lengths(v, g, dim, eps);
  for (size_t k = 0; k < count; ++k) check_forward_weight(v[k], g[k], dim[k], eps[k], out_dtype);
  check_one_device(v);
  if (count == 0) return {};

  Device device(v[0]);
  std::vector<ForwardWeight<Device>> weights;
  weights.reserve(count);
  c10::SmallVector<Forward, 1> table;
  for (size_t k = 0; k < count; ++k) {
    const double to = forced.empty() ? 0 : forced[k];
    const auto& weight = weights.emplace_back(v[k], g[k], dim[k], eps[k], out_dtype, to);
    if (!weight.is_empty()) table.push_back(weight.line);
  }
  device.forward(table.data(), static_cast<int64_t>(table.size()));
  for (size_t k = 0; k < forced.size(); ++k) {
    if (forced[k] == 0) continue;
    if (!weights[k].v.is_same(v[k])) v[k].copy_(weights[k].v);
    v[k].unsafeGetTensorImpl()->bump_version();
  }
  Tensors results(2 * count);
  for (size_t k = 0; k < count; ++k) {
    results[k] = with_type<Device>(std::move(weights[k].w), out_dtype.value_or(v[k].scalar_type()));
    results[count + k] = std::move(weights[k].norm);
  }
  return results;
}

template <class Device>
Tensors forward_on(at::TensorList v, at::TensorList g, at::IntArrayRef dim,
                   at::ArrayRef<double> eps, std::optional<at::ScalarType> out_dtype) {
  return forward_list<Device>(v, g, {}, dim, eps, out_dtype);
}

template <class Device>
Tensors forced_on(at::TensorList v, at::TensorList g, at::ArrayRef<double> forced,
                  at::IntArrayRef dim, at::ArrayRef<double> eps,
                  std::optional<at::ScalarType> out_dtype) {
  check_forced(v, forced);
  const at::AutoDispatchBelowADInplaceOrView below;  // versions count up once, here
  return forward_list<Device>(v, g, forced, dim, eps, out_dtype);
}

// Checks all weights before it writes to the first.
template <class Device>
Tensors normalize_on(at::TensorList v, at::TensorList g, at::IntArrayRef dim,
                     at::ArrayRef<double> eps) {
  const size_t count = v.size();
  check_forward_lengths(v, g, dim, eps);
  for (size_t k = 0; k < count; ++k) {
    check_forward_weight(v[k], g[k], dim[k], eps[k], std::nullopt);
    check_dense(v[k]);
  }
  check_one_device(v);
  if (count == 0) return {};

  Device device(v[0]);
  Tensors norms, scales;
  std::vector<Forward> table;
  for (size_t k = 0; k < count; ++k) {
    const at::ScalarType acc = accumulation_dtype(v[k].scalar_type());
    at::Tensor& norm = norms.emplace_back(Device::empty_norm(g[k].sizes(), acc));
    if (v[k].numel() == 0) {
      norm.zero_();
      continue;
    }
    const DType type = dtype_of(v[k].scalar_type());
    void* const data = v[k].mutable_data_ptr();
    const at::Tensor& scale = scales.emplace_back(g[k].contiguous());
    table.push_back({data, scale.const_data_ptr(), data, norm.mutable_data_ptr(),
                     row_view(v[k], canonical_dim(dim[k], v[k].dim())), type,
                     dtype_of(scale.scalar_type()), type, dtype_of(acc), least_eps(eps[k], acc),
                     /*forced=*/0});
  }
  device.forward(table.data(), static_cast<int64_t>(table.size()));
  for (const at::Tensor& t : v) t.unsafeGetTensorImpl()->bump_version();
  return norms;
}

// One weight of a backward, like ForwardWeight. grad_v and grad_g are undefined if they are not
// wanted.
template <class Device>
struct BackwardWeight {
  at::Tensor grad_w, v, g, norm, grad_v, grad_g;
  Backward line{};

  BackwardWeight(const at::Tensor& grad_w_, const at::Tensor& v_, const at::Tensor& g_,
                 const at::Tensor& norm_, int64_t dim, double eps, bool need_v, bool need_g) {
    const auto [v_type, w_type] = types_of<Device>(v_.scalar_type(), grad_w_.scalar_type());
    v = with_type<Device>(dense(v_), v_type);
    g = g_.contiguous();
    grad_w = ordered_like<Device>(grad_w_, v, w_type);
    void *to_v = nullptr, *to_g = nullptr;
    if (need_v) {
      grad_v = empty_like<Device>(v, v_type, {&v, &grad_w});
      to_v = grad_v.mutable_data_ptr();
    }
    if (need_g) {
      grad_g = empty_like<Device>(g, g.scalar_type());
      to_g = grad_g.mutable_data_ptr();
    }
    if (is_empty()) {  // the norm of a row without elements is constant
      if (need_g) grad_g.zero_();
      return;
    }
    norm = norm_.contiguous();
    line = {grad_w.const_data_ptr(),
            v.const_data_ptr(),
            g.const_data_ptr(),
            norm.const_data_ptr(),
            to_v,
            to_g,
            row_view(v, dim),
            dtype_of(v_type),
            dtype_of(g.scalar_type()),
            dtype_of(w_type),
            eps};
  }

  bool is_empty() const { return v.numel() == 0; }
};

inline void check_backward_weight(const at::Tensor& grad_w, const at::Tensor& v,
                                  const at::Tensor& g, const at::Tensor& norm, int64_t dim,
                                  double eps) {
  check_backward(grad_w, v, g, norm, dim, eps);
  check_memory("grad_w", grad_w);
  check_memory("v", v);
  check_memory("g", g);
}

// Computes grad_v and grad_g of one weight; each is undefined if it is not wanted.
template <class Device>
TensorPair gradients_on(const at::Tensor& grad_w, const at::Tensor& v, const at::Tensor& g,
                        const at::Tensor& norm, int64_t dim, double eps, bool need_v, bool need_g) {
  check_backward_weight(grad_w, v, g, norm, dim, eps);
  Device device(v);
  BackwardWeight<Device> weight(grad_w, v, g, norm, dim, eps, need_v, need_g);
  if (!weight.is_empty()) device.backward(&weight.line, 1);
  if (need_v) weight.grad_v = with_type<Device>(std::move(weight.grad_v), v.scalar_type());
  return {std::move(weight.grad_v), std::move(weight.grad_g)};
}

template <class Device>
TensorPair backward_one_on(const at::Tensor& grad_w, const at::Tensor& v, const at::Tensor& g,
                           const at::Tensor& norm, int64_t dim, double eps, bool need_v,
                           bool need_g, Bucket) {
  auto [grad_v, grad_g] = gradients_on<Device>(grad_w, v, g, norm, dim, eps, need_v, need_g);
  return {need_v ? std::move(grad_v) : not_wanted(v), need_g ? std::move(grad_g) : not_wanted(g)};
}

template <class Device>
Tensors backward_on(at::TensorList grad_w, at::TensorList v, at::TensorList g, at::TensorList norm,
                    at::IntArrayRef dim, at::ArrayRef<double> eps, at::IntArrayRef need_v,
                    at::IntArrayRef need_g) {
  const size_t count = v.size();
  check_backward_lengths(grad_w, v, g, norm, dim, eps, need_v, need_g);
  for (size_t k = 0; k < count; ++k)
    check_backward_weight(grad_w[k], v[k], g[k], norm[k], dim[k], eps[k]);
  check_one_device(v);
  if (count == 0) return {};

  Device device(v[0]);
  std::vector<BackwardWeight<Device>> weights;
  weights.reserve(count);
  c10::SmallVector<Backward, 1> table;
  for (size_t k = 0; k < count; ++k) {
    if (!need_v[k] && !need_g[k]) continue;
    const auto& weight =
        weights.emplace_back(grad_w[k], v[k], g[k], norm[k], dim[k], eps[k], need_v[k], need_g[k]);
    if (!weight.is_empty()) table.push_back(weight.line);
  }
  device.backward(table.data(), static_cast<int64_t>(table.size()));
  Tensors grads;
  auto weight = weights.begin();
  for (size_t k = 0; k < count; ++k) {
    if (need_v[k])
      grads.push_back(with_type<Device>(std::move(weight->grad_v), v[k].scalar_type()));
    if (need_v[k] || need_g[k]) ++weight;
  }
  for (auto& w : weights)
    if (w.grad_g.defined()) grads.push_back(std::move(w.grad_g));
  return grads;
}

}  // namespace wnkernel
