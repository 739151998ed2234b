// The parts of CUDA that csrc/cuda needs, on a CPU, for a C++ compiler with sanitizers. Blocks run
// one after the other. There are no atomics, and the only memory is that of the process.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#include "block.h"
#include "types.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__ &  // refers to the copy that a launch makes

#define threadIdx (simt::thread_index)
#define blockIdx (simt::block_index)

#define WNKERNEL_LAUNCH(kernel, blocks, threads, stream, ...) \
  simt::launch(kernel, blocks, threads, stream, __VA_ARGS__)
#define WNKERNEL_SHARED(type, name) \
  type& name = *static_cast<type*>(simt::shared(#name, sizeof(type)))

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidConfiguration = 9;
inline cudaError_t cudaGetLastError() { return std::exchange(simt::state.last_error, cudaSuccess); }

// Every number of processors is a device of its own. Each processor has room for three blocks, or
// for two blocks of a second launch if the number is odd.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) {
  *device = simt::state.processors;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = device;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = simt::state.processors % 2 && !simt::state.launches.empty() ? 2 : 3;
  return cudaSuccess;
}

inline void __syncthreads(simt::Site at = simt::here()) {
  simt::meet(simt::Call::syncthreads, at, 0);
}
inline int __syncthreads_or(int x, simt::Site at = simt::here()) {
  return simt::meet(simt::Call::syncthreads_or, at, x != 0) != 0;
}
inline int __any_sync(unsigned mask, int x, simt::Site at = simt::here()) {
  return simt::meet(simt::Call::any, at, x != 0, mask) != 0;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int step, simt::Site at = simt::here()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof(T));
  bits = simt::meet(simt::Call::shfl_xor, at, bits, mask, static_cast<unsigned>(step));
  memcpy(&x, &bits, sizeof(T));
  return x;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T x) {
  *p = x;
}

inline float __fdividef(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline double __dsqrt_rn(double x) { return sqrt(x); }
