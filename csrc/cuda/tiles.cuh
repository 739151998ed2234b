// Tiles of a run or of a strip, one after the other: where a thread's vectors lie, which rows they
// belong to, and sums over all of them.
#pragma once
#include "reduce.cuh"
#include "scale.cuh"
#include "table.h"

namespace wnkernel::cuda {

template <class Sum>
struct Scratch {
  Sum warps[kWarps];
  Sum partial[kWarps][kMostColumns];
  Sum columns[4][kMostColumns];
};

// A block's parts of a row (runs), or of a strip of columns of adjacent rows. A thread keeps to its
// columns of a strip from tile to tile. What there is once for a column (a run has one) is computed
// by the thread that owns it.
template <bool Strip, int N>
struct Tiles {
  static constexpr int M = Strip ? N : 1;  // columns of a thread
  static constexpr int K = vectors(N);     // of a tile, of a thread
  static constexpr int kStripLogX = strip_log_x(N);

  const Plan& plan;
  int strip;       // or row
  int part;        // the first of this block
  int part_end;    // the first that is another block's
  int x, y;        // of this thread in a tile
  int64_t origin;  // of the row or strip
  int64_t end;     // where this thread has no more vectors

  // per_block: parts of a block.
  __device__ Tiles(const Plan& p, int per_block, int block) : plan(p) {
    const int sharing = (p.parts + per_block - 1) / per_block;
    strip = block / sharing;
    part = (block - strip * sharing) * per_block;
    part_end = p.parts - part < per_block ? p.parts : part + per_block;
    x = threadIdx.x & ((1 << log_x()) - 1);
    y = threadIdx.x >> log_x();
    origin = int64_t{strip} * (Strip ? p.strip_rows : 1) * p.inner;
    end = !Strip || x < width() ? p.numel : 0;
  }

  // Of a part: its first tile. The first of the next one is where it ends.
  __device__ int start(int of) const { return of == plan.parts ? plan.tiles : of * plan.per_part; }

  __device__ int log_x() const { return Strip ? kStripLogX : plan.log_x; }
  __device__ int threads_y() const { return kThreads >> log_x(); }
  // Vectors of a line. A strip at the end has what is left.
  __device__ int64_t width() const {
    const int64_t left = (plan.pitch - origin) / N;
    return Strip && plan.width > left ? left : plan.width;
  }
  __device__ int columns() const { return Strip ? N << log_x() : 1; }
  __device__ int column(int j) const { return Strip ? x * N + j : 0; }
  __device__ int inner() const { return static_cast<int>(plan.inner); }  // of strips

  // Of the column that this thread owns, if it owns one.
  __device__ int own() const { return static_cast<int>(threadIdx.x); }
  __device__ int64_t row() const {
    return Strip ? int64_t{strip} * plan.strip_rows + own() / inner() % plan.strip_rows : strip;
  }
  __device__ bool owns_row() const { return own() < columns() && (!Strip || own() < width() * N); }
  // Whether it is the one to write what there is once for a row.
  __device__ bool is_first() const {
    if (part != 0 || !owns_row()) return false;
    return !Strip || (own() < plan.strip_rows * inner() && own() % inner() == 0);
  }

  // Vector k of this thread in a tile: where it begins, -1 if there is none. Those of a strip lie
  // one below the other, whatever their tile.
  __device__ int64_t at(int tile, int k) const {
    const int log = plan.log_across, below = tile / plan.across,
              beside = tile - below * plan.across;
    const int64_t step = Strip ? int64_t{tile} * K + k : int64_t{below} * (K >> log) + (k >> log);
    const int64_t line = step * threads_y() + y;
    const int64_t column =
        Strip ? x : ((int64_t{beside} << log | (k & ((1 << log) - 1))) << log_x()) + x;
    const int64_t start = origin + column * N + line * plan.pitch;
    // Where lines of a narrow matrix lie side by side, the last line may end early.
    const bool there = Strip ? start < end : line < plan.lines && column < plan.width;
    return there ? start : -1;
  }

  // Over the block: one for each column, in the thread that owns it. It takes a barrier to come
  // here again.
  template <class Sum, class Op>
  __device__ Sum reduce(const Sum (&sums)[M], Scratch<Sum>& scratch, Op op) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int lanes = Strip ? 1 << log_x() : 1;  // with different columns
#pragma unroll
    for (int j = 0; j < M; ++j) {
      const Sum sum = reduce_lanes(sums[j], lanes, kWarp, op);
      if (lane < lanes) scratch.partial[warp][column(j)] = sum;
    }
    __syncthreads();
    if (own() >= columns()) return Sum(0);
    Sum sum = scratch.partial[0][own()];
    for (int k = 1; k < kWarps; ++k) sum = op(sum, scratch.partial[k][own()]);
    return sum;
  }

  // Sums of rows, in the threads that own a column of them.
  template <class Sum>
  __device__ Sum add_up(const Sum (&sums)[M], Scratch<Sum>& scratch) const {
    const Sum sum = reduce(sums, scratch, Add());
    if (!Strip) return sum;
    const int period = plan.strip_rows * inner();
    if (inner() == 1 && period == columns()) return sum;  // a row for every column
    if (own() < columns()) scratch.columns[0][own()] = sum;
    __syncthreads();
    if (!owns_row()) return Sum(0);
    Sum of_row = 0;
    for (int line = own() % period / inner() * inner(); line < columns(); line += period)
      for (int k = line; k < line + inner() && k < columns(); ++k) of_row += scratch.columns[0][k];
    return of_row;
  }

  // Numbers 1 to 3 of every column, from the thread that owns it. To be read after a barrier.
  template <class Sum>
  __device__ void set(int number, Sum value, Scratch<Sum>& scratch) const {
    if (own() < columns()) scratch.columns[number][own()] = value;
  }
  template <class Sum>
  __device__ void get(int number, Sum (&to)[M], const Scratch<Sum>& scratch) const {
#pragma unroll
    for (int j = 0; j < M; ++j) to[j] = scratch.columns[number][column(j)];
  }

  // Of a part of a split row or strip: `planes` numbers for each of its columns.
  template <class Sum>
  __device__ Sum* partial_sum(void* partials, int of, int plane, int planes, int c) const {
    const int64_t part_of_all = int64_t{strip} * plan.parts + of;
    return static_cast<Sum*>(partials) + (part_of_all * planes + plane) * columns() + c;
  }
};

}  // namespace wnkernel::cuda
