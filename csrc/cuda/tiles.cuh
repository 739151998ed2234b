// The tiles of a run or of a strip, one after the other: where a thread's vectors lie, which rows
// they belong to, and the sums over all of them.
#pragma once
#include "reduce.cuh"
#include "scale.cuh"
#include "table.h"

namespace wnkernel::cuda {

template <class Sum>
struct Scratch {
  Sum warps[kWarps];
  Sum partial[kWarps][kMostColumns];
  Sum columns[5][kMostColumns];
};

// The parts of a row (runs), or of a strip of columns of adjacent rows, that one block takes. A
// thread keeps the same columns of a strip in every tile. Each quantity of a column (a run has one
// column) is computed by the thread that owns the column.
template <bool Strip, int N>
struct Tiles {
  static constexpr int M = Strip ? N : 1;  // columns of a thread
  static constexpr int K = vectors(N);     // vectors of a thread in a tile
  static constexpr int kStripLogX = strip_log_x(N);

  const Plan& plan;
  int strip;       // number of the strip, or of the row
  int part;        // the first part of this block
  int part_end;    // the first part of the next block
  int x, y;        // the place of this thread in a tile
  int64_t origin;  // the first element of the row or strip
  int64_t end;     // from here on this thread has no vectors

  // per_block is how many parts a block takes.
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

  // The first tile of a part. The part ends where the next one starts.
  __device__ int start(int of) const { return of == plan.parts ? plan.tiles : of * plan.per_part; }

  __device__ int log_x() const { return Strip ? kStripLogX : plan.log_x; }
  __device__ int threads_y() const { return kThreads >> log_x(); }
  // The number of vectors in a line. The last strip has those that are left.
  __device__ int64_t width() const {
    const int64_t left = (plan.pitch - origin) / N;
    return Strip && plan.width > left ? left : plan.width;
  }
  __device__ int columns() const { return Strip ? N << log_x() : 1; }
  __device__ int column(int j) const { return Strip ? x * N + j : 0; }
  __device__ int inner() const { return static_cast<int>(plan.inner); }  // strips only

  // own() is the column that this thread owns, if it owns one; row() is the row of that column.
  __device__ int own() const { return static_cast<int>(threadIdx.x); }
  __device__ int64_t row() const {
    return Strip ? int64_t{strip} * plan.strip_rows + own() / inner() % plan.strip_rows : strip;
  }
  __device__ bool owns_row() const { return own() < columns() && (!Strip || own() < width() * N); }
  // Whether this thread writes the quantities of its row that exist once per row.
  __device__ bool is_first() const {
    if (part != 0 || !owns_row()) return false;
    return !Strip || (own() < plan.strip_rows * inner() && own() % inner() == 0);
  }

  // Where vector k of this thread in a tile begins; -1 if there is no such vector. The vectors of a
  // strip lie one below the other, across all tiles.
  __device__ int64_t at(int tile, int k) const {
    const int log = plan.log_across, below = tile / plan.across,
              beside = tile - below * plan.across;
    const int64_t step = Strip ? int64_t{tile} * K + k : int64_t{below} * (K >> log) + (k >> log);
    const int64_t line = step * threads_y() + y;
    const int64_t column =
        Strip ? x : ((int64_t{beside} << log | (k & ((1 << log) - 1))) << log_x()) + x;
    const int64_t start = origin + column * N + line * plan.pitch;
    // If lines of a narrow matrix lie side by side, the last line may end early.
    const bool there = Strip ? start < end : line < plan.lines && column < plan.width;
    return there ? start : -1;
  }

  // Reduces over the block: the thread that owns a column gets the result of that column. A barrier
  // must precede the next call.
  template <class Sum, class Op>
  __device__ Sum reduce(const Sum (&sums)[M], Scratch<Sum>& scratch, Op op) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int lanes = Strip ? 1 << log_x() : 1;  // lanes with different columns
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

  // Returns the sum of a row in every thread that owns a column of it.
  template <class Sum>
  __device__ Sum add_up(const Sum (&sums)[M], Scratch<Sum>& scratch) const {
    const Sum sum = reduce(sums, scratch, Add());
    if (!Strip) return sum;
    const int period = plan.strip_rows * inner();
    if (inner() == 1 && period == columns()) return sum;  // each column is a row
    if (own() < columns()) scratch.columns[0][own()] = sum;
    __syncthreads();
    if (!owns_row()) return Sum(0);
    Sum of_row = 0;
    for (int line = own() % period / inner() * inner(); line < columns(); line += period)
      for (int k = line; k < line + inner() && k < columns(); ++k) of_row += scratch.columns[0][k];
    return of_row;
  }

  // set() stores number 1, 2, 3 or 4 of every column, in the thread that owns it. get() reads them
  // after a barrier.
  template <class Sum>
  __device__ void set(int number, Sum value, Scratch<Sum>& scratch) const {
    if (own() < columns()) scratch.columns[number][own()] = value;
  }
  template <class Sum>
  __device__ void get(int number, Sum (&to)[M], const Scratch<Sum>& scratch) const {
#pragma unroll
    for (int j = 0; j < M; ++j) to[j] = scratch.columns[number][column(j)];
  }

  // The place of a number of one part of a split row or strip, which has `planes` numbers for each
  // of its columns.
  template <class Sum>
  __device__ Sum* partial_sum(void* partials, int of, int plane, int planes, int c) const {
    const int64_t part_of_all = int64_t{strip} * plan.parts + of;
    return static_cast<Sum*>(partials) + (part_of_all * planes + plane) * columns() + c;
  }
};

}  // namespace wnkernel::cuda
