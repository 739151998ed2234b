// The forward of rows over many tiles, in three steps. Step 1 makes sums of squares, tile by tile.
// In step 2, if a row is split, each part stores its sum, and the second launch (Finish) adds them
// up. Step 3 makes norms and w, and takes the tiles in reverse: the last one is still in registers,
// those before it in a cache.
#pragma once
#include "tiles.cuh"

namespace wnkernel::cuda {

template <class V, bool Strip, int N>
__device__ inline void load_tile(const Tiles<Strip, N>& tiles, int tile, const V* v,
                                 Vector<V, N> (&x)[Tiles<Strip, N>::K]) {
#pragma unroll
  for (int k = 0; k < Tiles<Strip, N>::K; ++k) {
    const int64_t at = tiles.at(tile, k);
    x[k] = at < 0 ? zeros<V, N>() : load<N>(v + at);
  }
}

// Adds up the squares of unit * v over a part, in each column of a thread, and leaves the last tile
// in x.
template <class V, bool Strip, int N, class Sum>
__device__ inline void add_squares(const Tiles<Strip, N>& tiles, int part, const V* v,
                                   const Sum (&unit)[Tiles<Strip, N>::M],
                                   Sum (&sums)[Tiles<Strip, N>::M],
                                   Vector<V, N> (&x)[Tiles<Strip, N>::K]) {
#pragma unroll
  for (int m = 0; m < tiles.M; ++m) sums[m] = 0;
  const int end = tiles.start(part + 1);
  for (int tile = tiles.start(part); tile < end; ++tile) {
    load_tile(tiles, tile, v, x);
#pragma unroll
    for (int k = 0; k < tiles.K; ++k)
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int m = Strip ? j : 0;
        const Sum y = widen(x[k].x[j]) * unit[m];
        sums[m] = fma(y, y, sums[m]);
      }
#pragma unroll
    for (int k = 0; k < tiles.K; ++k) forget_widened(x[k]);
  }
}

// Converts a sum of squares of `from` * v to a sum of squares of `to` * v. `to` is at most `from`.
// If they differ, `from` is kUp or 1, so no division is needed.
template <class Sum>
__device__ inline Sum in_unit(Sum sum, Sum from, Sum to) {
  const Sum other = from == Range<Sum>::kUp ? to * (1 / Range<Sum>::kUp) : to;
  const Sum ratio = from == to ? Sum(1) : other;
  return sum * ratio * ratio;
}

// In threads that own a column, combines the sums of squares of all parts and their units into one.
// The smallest unit wins: it belongs to the largest numbers.
template <bool Strip, int N, class Sum>
__device__ inline void add_parts(const Tiles<Strip, N>& tiles, const ForwardLine& line,
                                 Scratch<Sum>& scratch, Sum& squares, Sum& unit) {
  constexpr int M = Tiles<Strip, N>::M;
  const int begin = Strip ? tiles.y : threadIdx.x, step = Strip ? tiles.threads_y() : kThreads;
  const auto part = [&](int q, int plane, int m) {
    return __ldg(
        tiles.template partial_sum<Sum>(line.partials, q, plane, kForwardPlanes, tiles.column(m)));
  };
  Sum own[M], units[M], sums[M];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    own[m] = Range<Sum>::kUp;
    sums[m] = 0;
  }
#pragma unroll(M > 4 ? 1 : 4)
  for (int q = begin; q < line.plan.parts; q += step)
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const Sum of_part = part(q, 1, m), smaller = Min()(own[m], of_part);
      sums[m] = in_unit(sums[m], own[m], smaller) + in_unit(part(q, 0, m), of_part, smaller);
      own[m] = smaller;
    }
  unit = tiles.reduce(own, scratch, Min());
  tiles.set(1, unit, scratch);
  __syncthreads();
  tiles.get(1, units, scratch);
#pragma unroll
  for (int m = 0; m < M; ++m) sums[m] = in_unit(sums[m], own[m], units[m]);
  squares = tiles.reduce(sums, scratch, Add());
}

template <class V, class W, int N, bool Strip, bool Finish>
__device__ inline void forward_tiles(const ForwardLine& line, int block,
                                     Scratch<typename Element<V>::Sum>& scratch) {
  using Sum = typename Element<V>::Sum;
  const Tiles<Strip, N> tiles(line.plan, line.per_block, block);
  constexpr int M = Tiles<Strip, N>::M, K = Tiles<Strip, N>::K;
  const V* v = static_cast<const V*>(line.v);

  // g is loaded before the first wait, and so is the tile that a second launch begins with.
  Vector<V, N> x[K];
  const int last = tiles.start(tiles.part_end) - 1;
  constexpr bool kHeld = N < 8;  // eight columns of halves leave no registers for a tile
  if constexpr (Finish && kHeld) load_tile(tiles, last, v, x);
  Held<Sum> g = 0;
  if (tiles.owns_row()) g = load_held<Sum>(line.g, line.g_type, tiles.row());

  Sum squares, unit = 1;
  if constexpr (Finish) {
    add_parts(tiles, line, scratch, squares, unit);
  } else {
    for (int part = tiles.part;; ++part) {
      Sum units[M], sums[M];
#pragma unroll
      for (int m = 0; m < M; ++m) units[m] = 1;
      for (bool again = false;; again = true) {  // extreme rows are scaled and added up again
        add_squares(tiles, part, v, units, sums, x);
        squares = tiles.add_up(sums, scratch);
        if (again) break;
        if (tiles.owns_row()) unit = unit_of(squares);
        if (!__syncthreads_or(unit != 1)) break;
        tiles.set(1, unit, scratch);
        __syncthreads();
        tiles.get(1, units, scratch);
      }
      if (line.plan.parts == 1) break;
      const auto leave = [&](int plane, Sum of_column) {
        *tiles.template partial_sum<Sum>(line.partials, part, plane, kForwardPlanes, tiles.own()) =
            of_column;
      };
      if (tiles.own() < tiles.columns()) {
        leave(0, squares);
        leave(1, unit);
      }
      if (part + 1 == tiles.part_end) return;
      __syncthreads();
    }
  }

  if constexpr (!kHeld) load_tile(tiles, last, v, x);
  if (tiles.owns_row()) {
    const auto f = Forwards<Sum>::of(squares, unit, value_of<Sum>(g, line.g_type), line);
    if (tiles.is_first()) static_cast<Sum*>(line.norm)[tiles.row()] = f.norm;
    tiles.set(1, f.a, scratch);
    tiles.set(2, f.b, scratch);
    if (line.forced > 0) {
      const auto of_v = Forwards<Sum>::of_v(squares, unit, line);
      tiles.set(3, of_v.a, scratch);
      tiles.set(4, of_v.b, scratch);
    }
  }
  __syncthreads();
  Sum a[M], b[M];
  tiles.get(1, a, scratch);
  tiles.get(2, b, scratch);
  const int first = tiles.start(tiles.part);
#pragma unroll 1
  for (int tile = last;; load_tile(tiles, tile, v, x)) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t at = tiles.at(tile, k);
      if (at < 0) continue;
      Vector<W, N> w;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int m = Strip ? j : 0;
        w.x[j] = narrow<W>(widen(x[k].x[j]) * a[m] * b[m]);
      }
      store_past_cache(static_cast<W*>(line.w) + at, w);
      if (!(line.forced > 0)) continue;
      Vector<V, N> of_v;
#pragma unroll
      for (int j = 0; j < N; ++j) {  // no registers are left for these factors
        const int c = tiles.column(j);
        of_v.x[j] = narrow<V>(widen(x[k].x[j]) * scratch.columns[3][c] * scratch.columns[4][c]);
      }
      store_past_cache(static_cast<V*>(const_cast<void*>(line.v)) + at, of_v);
    }
    if (--tile < first) break;
  }
}

}  // namespace wnkernel::cuda
