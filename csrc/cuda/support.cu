// Whether this module holds code for a card: asked of a kernel that does nothing.
#include "../weight_norm.h"
#include "device.h"

namespace wnkernel {
namespace {

__global__ void nothing() {}

}  // namespace

int cuda_supports_device() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, nothing);
  cudaGetLastError();  // it must not be reported by whatever comes next
  return static_cast<int>(error);
}

}  // namespace wnkernel
