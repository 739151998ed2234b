// Sums over threads, always in the same order. x + y == y + x, so in a butterfly all threads get
// the same bits.
#pragma once
#include "device.h"
#include "plan.h"

namespace wnkernel::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Min {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

// Over the lanes whose numbers differ in bits [from, to): a power of two each, up to a warp.
template <class Op, class T>
__device__ inline T reduce_lanes(T x, int from, int to, Op op) {
  for (int step = from; step < to; step *= 2) x = op(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// Over groups of `threads` neighbouring threads, a power of two. scratch: kWarps, shared; read
// last, so that it takes a barrier to come here again. All threads of the block have to come.
template <class Op, class T>
__device__ inline T reduce_group(T x, int threads, T* scratch, Op op) {
  x = reduce_lanes(x, 1, threads < kWarp ? threads : kWarp, op);
  if (threads <= kWarp) return x;
  const int warp = threadIdx.x / kWarp, warps = threads / kWarp;
  if (threadIdx.x % kWarp == 0) scratch[warp] = x;
  __syncthreads();
  const int first = warp / warps * warps;
  x = scratch[first];
  for (int k = 1; k < warps; ++k) x = op(x, scratch[first + k]);
  return x;
}

}  // namespace wnkernel::cuda
