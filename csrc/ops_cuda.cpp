// This file is compiled only if torch has CUDA and nvcc is installed (setup.py).
#if defined(WNKERNEL_CUDA)
#include <ATen/EmptyTensor.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <array>

#include "cuda/answer.h"
#include "cuda_devices.h"
#include "ops_device.h"

namespace wnkernel {

std::string cuda_reason(c10::DeviceIndex device) {
  static std::array<Answer, C10_COMPILE_TIME_MAX_GPUS> answers;
  const int error = answers.at(static_cast<size_t>(device)).get([device] {
    const c10::cuda::CUDAGuard guard(device);
    return cuda_supports_device();
  });
  return error ? cudaGetErrorString(static_cast<cudaError_t>(error)) : "";
}

namespace {

class Cuda {
 public:
  explicit Cuda(const at::Tensor& v) : guard_(v.device()) {}

  static at::Tensor empty(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype,
                          std::initializer_list<const at::Tensor*>) {
    return at::detail::empty_strided_generic(sizes, strides, c10::cuda::CUDACachingAllocator::get(),
                                             c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype);
  }
  static at::Tensor empty_norm(at::IntArrayRef sizes, at::ScalarType dtype) {
    return at::detail::empty_generic(sizes, c10::cuda::CUDACachingAllocator::get(),
                                     c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype,
                                     std::nullopt);
  }
  static constexpr bool takes(DType v, DType w) { return cuda_takes(v, w); }

  void forward(const Forward* table, int64_t count) { check(forward_cuda(table, count, launch())); }
  void backward(const Backward* table, int64_t count) {
    check(backward_cuda(table, count, launch()));
  }

 private:
  // Workspaces are freed when the call returns. The caching allocator gives their memory only to
  // later work of the same stream.
  CudaLaunch launch() {
    return {c10::cuda::getCurrentCUDAStream().stream(), this, [](void* context, int64_t bytes) {
              auto& workspaces = static_cast<Cuda*>(context)->workspaces_;
              return workspaces.emplace_back(empty_norm({bytes}, at::kByte)).mutable_data_ptr();
            }};
  }

  static void check(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

  c10::cuda::CUDAGuard guard_;
  c10::SmallVector<at::Tensor, 1> workspaces_;
};

}  // namespace

TORCH_LIBRARY_IMPL(wnkernel, CUDA, m) {
  m.impl("weight_norm", weight_norm_on<Cuda>);
  m.impl("forward_one", forward_one_on<Cuda>);
  m.impl("backward_one", backward_one_on<Cuda>);
  m.impl("forward", forward_on<Cuda>);
  m.impl("backward", backward_on<Cuda>);
  m.impl("forced", forced_on<Cuda>);
  m.impl("normalize_", normalize_on<Cuda>);
}

}  // namespace wnkernel
#endif
