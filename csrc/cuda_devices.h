#pragma once
#include <c10/core/Device.h>

#include <string>

namespace wnkernel {

// Why kernels cannot run on a card, in CUDA's words; empty if they can run. Repeated calls are
// cheap.
std::string cuda_reason(c10::DeviceIndex device);

}  // namespace wnkernel
