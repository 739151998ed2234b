// The kernels: each block finds its weight in the table and computes its part of it, for any kind
// of weight. Single weights and lists share one source, in which every fused multiplication is
// explicit (and the compiler may make no others), so that both give the same bits.
#pragma once
#include <type_traits>

#include "backward_tiles.cuh"
#include "forward_tiles.cuh"
#include "rows.cuh"

namespace wnkernel::cuda {

// The kinds of weights that a kernel handles. Its register count is that of its most demanding
// branch.
enum Kinds { kRows = 1, kTiles = 2, kAll = kRows | kTiles };

template <int N>
constexpr int kMost = most_row_vectors(N);

// Calls rows() with K, the number of vectors of N elements of a row that a thread holds, as an
// integral constant.
template <int N, class Rows>
__device__ inline void with_vectors(int log_across, Rows rows) {
  if (log_across == 0)
    rows(std::integral_constant<int, 1>());
  else if (kMost<N> == kRowVectors || log_across == 2)
    rows(std::integral_constant<int, kRowVectors>());
  else
    rows(std::integral_constant<int, kMost<N>>());
}

template <class V, class W, int N, int Of, bool Finish, class Sum>
__device__ inline void do_block(const ForwardLine& line, int block, Scratch<Sum>& scratch) {
  if ((Of & kTiles) == 0 || ((Of & kRows) && line.plan.kind == Kind::rows)) {
    if constexpr (Of & kRows)
      with_vectors<N>(line.plan.log_across, [&](auto k) {
        forward_rows<V, W, N, decltype(k)::value>(line, block, scratch.warps);
      });
  } else if constexpr (Of & kTiles) {
    if (line.plan.kind == Kind::runs)
      forward_tiles<V, W, N, false, Finish>(line, block, scratch);
    else
      forward_tiles<V, W, N, true, Finish>(line, block, scratch);
  }
}

template <class V, class W, int N, int Of, bool Finish, class Sum>
__device__ inline void do_block(const BackwardLine& line, int block, Scratch<Sum>& scratch) {
  if ((Of & kTiles) == 0 || ((Of & kRows) && line.plan.kind == Kind::rows)) {
    if constexpr (Of & kRows)
      with_vectors<N>(line.plan.log_across, [&](auto k) {
        backward_rows<V, W, N, decltype(k)::value>(line, block, scratch.warps);
      });
  } else if constexpr (Of & kTiles) {
    if (line.plan.kind == Kind::runs)
      backward_tiles<V, W, N, false, Finish>(line, block, scratch);
    else
      backward_tiles<V, W, N, true, Finish>(line, block, scratch);
  }
}

// The minimum number of blocks per processor, which limits the registers of a thread: 80 for three
// blocks, 128 for two. It is three where the compiler then needs no spills; see docs/cuda.md.
template <class Line, class V, class W, int Capacity, int Of>
constexpr int blocks_of_processor() {
  constexpr bool forward = std::is_same_v<Line, ForwardLine>, single = Capacity == 1;
  constexpr bool f32 = sizeof(V) + sizeof(W) == 8, f64 = sizeof(V) == 8;
  if (Of == kRows) return (forward && (single || !f64)) || (single && f32) ? 3 : 2;
  return Of == kTiles && single && (forward || !f64) ? 3 : 2;
}

// Line is ForwardLine or BackwardLine. Of is the kinds of weights in the table. Finish marks the
// second launch, which handles only split weights.
template <class Line, class V, class W, int Capacity, int Of, bool Finish>
__global__ void __launch_bounds__(kThreads, blocks_of_processor<Line, V, W, Capacity, Of>())
    weight_norm_kernel(const Table<Line, Capacity> __grid_constant__ table) {
  using Sum = typename Element<V>::Sum;
  WNKERNEL_SHARED(Scratch<Sum>, scratch);
  const int k = Capacity == 1 ? 0 : table.line_of(static_cast<int32_t>(blockIdx.x));
  const Line& line = table.lines[k];
  const int block = static_cast<int>(blockIdx.x) - table.first[k];
  if (line.plan.vector > 1)
    do_block<V, W, kVectorBytes / sizeof(V), Of, Finish>(line, block, scratch);
  else
    do_block<V, W, 1, Of, Finish>(line, block, scratch);
}

}  // namespace wnkernel::cuda
