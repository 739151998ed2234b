// What a launch reads: a table of weights, passed by value among the arguments of the kernel.
#pragma once
#include "device.h"
#include "plan.h"

namespace wnkernel::cuda {

// One weight of a launch. partials: of split weights, a sum for each part (rows) or for each part
// and column of its strip; two planes of them in a forward, see tiles.cuh. per_block: the parts
// that a block takes, chosen for the card by launch.cuh.
struct ForwardLine {
  const void* v;
  const void* g;
  void* w;
  void* norm;
  void* partials;
  double eps;
  Plan plan;
  int32_t per_block;
  DType g_type, divisor_type;
};

struct BackwardLine {
  const void* grad_w;
  const void* v;
  const void* g;
  const void* norm;
  void* grad_v;  // null: not wanted
  void* grad_g;  // null: not wanted
  void* partials;
  double eps;
  Plan plan;
  int32_t per_block;
  DType g_type;
};

constexpr int kForwardPlanes = 2;
constexpr int kBackwardPlanes = 1;

// Lines of tables of lists. Kernels take up to 32,764 bytes of arguments, from CUDA 12.1 and
// compute capability 7.0 on. A launch copies the whole table, whatever is in it: 9.5 KB of few
// lines, 32 of most. Each size takes kernels of its own, so there are two.
constexpr int kFewLines = 64;
constexpr int kMostLines = 220;
constexpr int64_t kMostBlocks = 0x7fffffff;  // of a launch

template <class Line, int Capacity>
struct Table {
  static constexpr int kCapacity = Capacity;

  int32_t count;
  int32_t first[Capacity + 1];  // the first block of every line, and the number of all
  Line lines[Capacity];

  // The line that a block works on.
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
