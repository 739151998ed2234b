// Backward of rows over many tiles, in the three steps of forward_tiles.cuh.
#pragma once
#include "tiles.cuh"

namespace wnkernel::cuda {

template <class V, class W, int N, bool Strip, bool Finish>
__device__ inline void backward_tiles(const BackwardLine& line, int64_t block,
                                      Scratch<typename Element<V>::Sum>& scratch) {
  using Sum = typename Element<V>::Sum;
  const Tiles<Strip, N> tiles(line.plan, block);
  constexpr int M = Tiles<Strip, N>::M;
  const V* v = static_cast<const V*>(line.v);
  const W* grad_w = static_cast<const W*>(line.grad_w);

  Backwards<Sum> own{};
  if (tiles.owns_row())
    own = Backwards<Sum>::of(static_cast<const Sum*>(line.norm)[tiles.row()],
                             static_cast<Sum>(line.eps));
  tiles.set(1, own.inverse, scratch);
  __syncthreads();
  Sum inverse[M], sums[M];
  tiles.get(1, inverse, scratch);
#pragma unroll
  for (int m = 0; m < M; ++m) sums[m] = 0;

  // Vectors of v, and as many of grad_w, that are on their way at a time.
  constexpr int K = Tiles<Strip, N>::K, B = N == 8 ? K / 2 : K;
  const auto load_some = [&](int tile, int from, Vector<V, N>(&x)[B], Vector<W, N>(&grad)[B]) {
#pragma unroll
    for (int k = 0; k < B; ++k) {
      const int64_t at = tiles.at(tile, from + k);
      x[k] = at < 0 ? zeros<V, N>() : load<N>(v + at);
      grad[k] = at < 0 ? zeros<W, N>() : load<N>(grad_w + at);
    }
  };

  Sum s;
  if constexpr (Finish) {
    const int64_t first = tiles.strip * line.plan.split;
    const int begin = Strip ? tiles.y : threadIdx.x, step = Strip ? tiles.threads_y() : kThreads;
#pragma unroll 4
    for (int q = begin; q < line.plan.split; q += step)
#pragma unroll
      for (int m = 0; m < M; ++m)
        sums[m] += *tiles.template partial_sum<Sum>(line.partials, first + q, 0, kBackwardPlanes,
                                                    tiles.column(m));
    s = tiles.reduce(sums, scratch, Add());
  } else {
    for (int tile = tiles.start; tile < tiles.end; ++tile)
#pragma unroll 1
      for (int from = 0; from < K; from += B) {
        Vector<V, N> x[B];
        Vector<W, N> grad[B];
        load_some(tile, from, x, grad);
#pragma unroll
        for (int k = 0; k < B; ++k)
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const int m = Strip ? j : 0;
            sums[m] = fma(Sum(widen(grad[k].x[j])), widen(x[k].x[j]) * inverse[m], sums[m]);
          }
      }
    s = tiles.add_up(sums, scratch);
    if (line.plan.split > 1) {
      if (tiles.own() < tiles.columns())
        *tiles.template partial_sum<Sum>(line.partials, block, 0, kBackwardPlanes, tiles.own()) = s;
      return;
    }
  }

  if (line.grad_g && tiles.is_first()) store_as(line.grad_g, line.g_type, tiles.row(), s);
  if (!line.grad_v) return;
  if (tiles.owns_row()) {
    const Sum g = load_as<Sum>(line.g, line.g_type, tiles.row());
    tiles.set(1, g * own.inverse, scratch);
    tiles.set(2, own.clamped ? Sum(0) : s, scratch);
  }
  __syncthreads();
  Sum ratio[M], along[M];
  tiles.get(1, ratio, scratch);
  tiles.get(2, along, scratch);
  for (int tile = tiles.end - 1; tile >= tiles.start; --tile)
#pragma unroll 1
    for (int from = 0; from < K; from += B) {
      Vector<V, N> x[B];
      Vector<W, N> grad[B];
      load_some(tile, from, x, grad);
#pragma unroll
      for (int k = 0; k < B; ++k) {
        const int64_t at = tiles.at(tile, from + k);
        if (at < 0) continue;
        Vector<V, N> to;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const int m = Strip ? j : 0;
          const Sum u = widen(x[k].x[j]) * inverse[m];
          to.x[j] = narrow<V>(fma(-u, along[m], Sum(widen(grad[k].x[j]))) * ratio[m]);
        }
        store_past_cache(static_cast<V*>(line.grad_v) + at, to);
      }
    }
}

}  // namespace wnkernel::cuda
