// The backward of rows over many tiles, in the three steps of forward_tiles.cuh.
#pragma once
#include "tiles.cuh"

namespace wnkernel::cuda {

template <class V, class W, int N, bool Strip, bool Finish>
__device__ inline void backward_tiles(const BackwardLine& line, int block,
                                      Scratch<typename Element<V>::Sum>& scratch) {
  using Sum = typename Element<V>::Sum;
  const Tiles<Strip, N> tiles(line.plan, line.per_block, block);
  constexpr int M = Tiles<Strip, N>::M;
  const V* v = static_cast<const V*>(line.v);
  const W* grad_w = static_cast<const W*>(line.grad_w);

  // B vectors of v, and B of grad_w, are loaded at a time: a whole tile, or half of one. The store
  // loop starts with the step that was read last, because its vectors are still in registers.
  constexpr int K = Tiles<Strip, N>::K, B = N == 8 ? K / 2 : K, kSteps = K / B;
  const int first = tiles.start(tiles.part) * kSteps;
  const int last = tiles.start(tiles.part_end) * kSteps - 1;
  const auto place = [&](int step, int k) {
    const int half = kSteps == 1 ? 0 : step & 1;
    return tiles.at(step / kSteps, half * B + k);
  };
  Vector<V, N> x[B];
  Vector<W, N> grad[B];
  const auto load_step = [&](int step) {
#pragma unroll
    for (int k = 0; k < B; ++k) {
      const int64_t at = place(step, k);
      x[k] = at < 0 ? zeros<V, N>() : load<N>(v + at);
      grad[k] = at < 0 ? zeros<W, N>() : load<N>(grad_w + at);
    }
  };

  // Loads of norms, g and the first vectors are all issued before the first wait.
  Sum norm = 1;
  Held<Sum> g = 0;
  if (tiles.owns_row()) {
    norm = __ldg(static_cast<const Sum*>(line.norm) + tiles.row());
    g = load_held<Sum>(line.g, line.g_type, tiles.row());
  }
  // With eight columns of halves, or with float64, no registers are left to hold a tile during the
  // sums.
  constexpr bool kHeld = N < 8 && sizeof(Sum) == 4;
  if constexpr (!Finish)
    load_step(first);
  else if constexpr (kHeld)
    load_step(last);
  const auto own = Backwards<Sum>::of(norm, line.eps);
  const auto own_ratio = own.ratio(value_of<Sum>(g, line.g_type));
  tiles.set(1, own.inverse, scratch);
  tiles.set(2, own_ratio.a, scratch);
  tiles.set(3, own_ratio.b, scratch);
  __syncthreads();
  Sum inverse[M], sums[M];
  tiles.get(1, inverse, scratch);
#pragma unroll
  for (int m = 0; m < M; ++m) sums[m] = 0;

  Sum s;
  if constexpr (Finish) {
    const int begin = Strip ? tiles.y : threadIdx.x, by = Strip ? tiles.threads_y() : kThreads;
#pragma unroll(M > 4 ? 1 : 4)
    for (int q = begin; q < line.plan.parts; q += by)
#pragma unroll
      for (int m = 0; m < M; ++m)
        sums[m] += __ldg(
            tiles.template partial_sum<Sum>(line.partials, q, 0, kBackwardPlanes, tiles.column(m)));
    s = tiles.reduce(sums, scratch, Add());
  } else {
    int step = first;
    for (int part = tiles.part;; ++part) {
      const int end = tiles.start(part + 1) * kSteps;
#pragma unroll 1
      for (;; load_step(step)) {
#pragma unroll
        for (int k = 0; k < B; ++k)
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const int m = Strip ? j : 0;
            sums[m] = fma(Sum(widen(grad[k].x[j])), widen(x[k].x[j]) * inverse[m], sums[m]);
          }
        if (++step == end) break;
      }
      s = tiles.add_up(sums, scratch);
      if (line.plan.parts == 1) break;
      if (tiles.own() < tiles.columns())
        *tiles.template partial_sum<Sum>(line.partials, part, 0, kBackwardPlanes, tiles.own()) = s;
      if (part + 1 == tiles.part_end) return;
      load_step(step);
#pragma unroll
      for (int m = 0; m < M; ++m) sums[m] = 0;
      __syncthreads();
    }
  }

  s = own.dot(s);
  if (line.grad_g && tiles.is_first()) store_as(line.grad_g, line.g_type, tiles.row(), s);
  if (!line.grad_v) return;
  if constexpr (!kHeld) load_step(last);
  if (tiles.owns_row()) s = along_added<false>(s, line, tiles.row());
  tiles.set(1, own.along(s), scratch);
  const bool two_factors =
      __syncthreads_or(own_ratio.b != 1);  // one answer for all rows saves registers
  Sum ratio[M], along[M];
  tiles.get(2, ratio, scratch);
  tiles.get(1, along, scratch);
#pragma unroll 1
  for (int step = last;; load_step(step)) {
#pragma unroll
    for (int k = 0; k < B; ++k) {
      const int64_t at = place(step, k);
      if (at < 0) continue;
      Vector<V, N> to;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int m = Strip ? j : 0;
        const Sum u = widen(x[k].x[j]) * inverse[m];
        Sum y = fma(-u, along[m], Sum(widen(grad[k].x[j]))) * ratio[m];
        if (two_factors) y *= scratch.columns[3][tiles.column(m)];
        to.x[j] = narrow<V>(y);
      }
      store_past_cache(static_cast<V*>(line.grad_v) + at, to);
    }
    if (--step < first) break;
  }
}

}  // namespace wnkernel::cuda
