// Keeps a card's answer to the question whether kernels run on it, if the answer cannot change.
#pragma once
#include <atomic>

#include "device.h"

namespace wnkernel {

// All other errors may be gone by the next call, for example a full memory or a stream under
// capture.
constexpr bool is_lasting(int error) {
  switch (error) {
    case cudaSuccess:
    case cudaErrorInsufficientDriver:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilationDisabled:
      return true;
    default:
      return false;
  }
}

class Answer {
 public:
  // Returns the kept answer, or what ask() returns: 0 or a CUDA error. Two threads may ask at once.
  template <class Ask>
  int get(const Ask& ask) {
    int error = error_.load(std::memory_order_relaxed);
    if (error != kNone) return error;
    error = ask();
    if (is_lasting(error)) error_.store(error, std::memory_order_relaxed);
    return error;
  }

 private:
  static constexpr int kNone = -1;
  std::atomic<int> error_{kNone};
};

}  // namespace wnkernel
