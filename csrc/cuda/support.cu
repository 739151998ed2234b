// Whether kernels run on a card: asked of the driver, and of a kernel that does nothing.
#include "../weight_norm.h"
#include "device.h"

namespace wnkernel {
namespace {

// Of 12.1: older ones (before R530) refuse more than 4 KB of arguments, whatever the toolkit was.
constexpr int kOldestDriver = 12010;

__global__ void nothing() {}

}  // namespace

int cuda_supports_device() {
  int driver = 0;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess && driver < kOldestDriver) error = cudaErrorInsufficientDriver;
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, nothing);
  cudaGetLastError();  // it must not be reported by whatever comes next
  return static_cast<int>(error);
}

}  // namespace wnkernel
