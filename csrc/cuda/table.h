// The input of a launch: a table of weights, passed by value among the arguments of the kernel.
#pragma once
#include "device.h"
#include "plan.h"

namespace wnkernel::cuda {

// One weight of a launch. partials has the sums of a split weight: one for each part of a row, or
// for each part and column of a strip. A forward has two planes of them; see tiles.cuh. per_block
// is how many parts a block takes; launch.cuh chooses it for the card. If v is replaced (forced >
// 0), eps is not 0.
struct ForwardLine {
  const void* v;
  const void* g;
  void* w;
  void* norm;
  void* partials;
  double eps, forced;
  Plan plan;
  int32_t per_block;
  DType g_type, divisor_type;
};

struct BackwardLine {
  const void* grad_w;
  const void* v;
  const void* g;
  const void* norm;
  void* grad_v;  // null if it is not wanted
  void* grad_g;  // null if it is not wanted
  void* partials;
  double eps;
  Plan plan;
  int32_t per_block;
  DType g_type;
};

constexpr int kForwardPlanes = 2;
constexpr int kBackwardPlanes = 1;

// The numbers of lines in the tables of lists. Kernels take up to 32,764 bytes of arguments, from
// CUDA 12.1 and compute capability 7.0 on. A launch always copies the whole table: 9.5 KB for
// kFewLines, 32 KB for kMostLines. Each size needs kernels of its own, so there are only two.
constexpr int kFewLines = 64;
constexpr int kMostLines = 220;
constexpr int64_t kMostBlocks = 0x7fffffff;  // of one launch

template <class Line, int Capacity>
struct Table {
  static constexpr int kCapacity = Capacity;

  int32_t count;
  int32_t first[Capacity + 1];  // the first block of every line, then the number of all blocks
  Line lines[Capacity];

  // Returns the line that a block works on.
  __host__ __device__ int line_of(int32_t block) const {
    int low = 0, high = count;  // first[low] <= block < first[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first[middle] <= block ? low : high) = middle;
    }
    return low;
  }
};
static_assert(sizeof(Table<BackwardLine, kMostLines>) <= 32764);

}  // namespace wnkernel::cuda
