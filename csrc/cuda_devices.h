// Which CUDA devices the kernels can run on.
#pragma once
#include <c10/core/Device.h>

#include <string>

namespace wnkernel {

// Why there are no kernels for a card, in CUDA's words; empty if there are. Asked once for each.
const std::string& cuda_reason(c10::DeviceIndex device);

}  // namespace wnkernel
