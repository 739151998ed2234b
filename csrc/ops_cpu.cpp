#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include "cpu_buffers.h"
#include "ops_device.h"

namespace wnkernel {
namespace {

Threads threads() {
  return {at::get_num_threads(), [](int tasks, void (*body)(void*, int), void* context) {
            at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t k = begin; k < end; ++k) body(context, static_cast<int>(k));
            });
          }};
}

struct Cpu {
  explicit Cpu(const at::Tensor&) {}

  static at::Tensor empty(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype,
                          std::initializer_list<const at::Tensor*> apart_from) {
    const KeepApart apart(apart_from);
    return at::detail::empty_strided_generic(sizes, strides, cpu_buffers(),
                                             c10::DispatchKeySet(c10::DispatchKey::CPU), dtype);
  }
  static at::Tensor empty_norm(at::IntArrayRef sizes, at::ScalarType dtype) {
    return at::detail::empty_cpu(sizes, dtype);
  }
  static constexpr bool takes(DType v, DType w) { return cpu_takes(v, w); }

  void forward(const Forward* table, int64_t count) { forward_cpu(table, count, threads()); }
  void backward(const Backward* table, int64_t count) { backward_cpu(table, count, threads()); }
};

}  // namespace

TensorPair forward_on_cpu(const at::Tensor& v, const at::Tensor& g, int64_t dim, double eps,
                          std::optional<at::ScalarType> out_dtype) {
  return forward_one_on<Cpu>(v, g, dim, eps, out_dtype);
}

TensorPair backward_on_cpu(const at::Tensor& grad_w, const at::Tensor& v, const at::Tensor& g,
                           const at::Tensor& norm, int64_t dim, double eps, bool need_v,
                           bool need_g) {
  return gradients_on<Cpu>(grad_w, v, g, norm, dim, eps, need_v, need_g);
}

TORCH_LIBRARY_IMPL(wnkernel, CPU, m) {
  m.impl("weight_norm", weight_norm_on<Cpu>);
  m.impl("forward_one", forward_one_on<Cpu>);
  m.impl("backward_one", backward_one_on<Cpu>);
  m.impl("forward", forward_on<Cpu>);
  m.impl("backward", backward_on<Cpu>);
  m.impl("forced", forced_on<Cpu>);
  m.impl("normalize_", normalize_on<Cpu>);
}

}  // namespace wnkernel
