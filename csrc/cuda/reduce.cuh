// Sums over threads, always in the same order. Because x + y == y + x, all threads of a butterfly
// get the same bits.
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

// Reduces over the lanes whose numbers differ in the bits [from, to). Both bounds are powers of
// two, up to a warp.
template <class Op, class T>
__device__ inline T reduce_lanes(T x, int from, int to, Op op) {
  for (int step = from; step < to; step *= 2) x = op(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// Reduces over groups of `threads` neighbouring threads, a power of two. All threads of the block
// must call it. scratch is shared and has kWarps elements. The call reads scratch last, so a
// barrier must precede the next call.
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
