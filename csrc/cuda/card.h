// Facts about the card that launches need, asked once per card. They never change which numbers are
// added up in which order; plan.h alone decides that.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>

#include "device.h"
#include "plan.h"

namespace wnkernel::cuda {

// How many blocks of one kernel the current device runs at a time: on each processor as many as its
// registers and shared memory allow. Two threads may ask at once.
class Places {
 public:
  template <class Kernel>
  cudaError_t get(Kernel kernel, int64_t& places) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    const auto k = static_cast<size_t>(device);
    places = k < kept_.size() ? kept_[k].load(std::memory_order_relaxed) : 0;
    if (places > 0) return cudaSuccess;
    int processors = 0, blocks = 0;
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0);
    if (error != cudaSuccess) return error;
    places = std::max<int64_t>(1, int64_t{processors} * blocks);
    if (k < kept_.size()) kept_[k].store(places, std::memory_order_relaxed);
    return cudaSuccess;
  }

 private:
  std::array<std::atomic<int64_t>, 64> kept_{};  // of the first devices; 0: not asked yet
};

}  // namespace wnkernel::cuda
