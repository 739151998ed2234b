// Whether kernels run on a card. It asks the driver, and for a kernel that does nothing.
#include "../weight_norm.h"
#include "device.h"

namespace wnkernel {
namespace {

// The driver of CUDA 12.1. Older ones (before R530) refuse more than 4 KB of arguments with any
// toolkit.
constexpr int kOldestDriver = 12010;

__global__ void nothing() {}

}  // namespace

int cuda_supports_device() {
  int driver = 0;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess && driver < kOldestDriver) error = cudaErrorInsufficientDriver;
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, nothing);
  cudaGetLastError();  // the next call must not report this error
  return static_cast<int>(error);
}

}  // namespace wnkernel
