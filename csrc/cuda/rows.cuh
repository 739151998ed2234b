// Short contiguous rows: neighbouring threads hold a row in registers from the load to the store.
#pragma once
#include "reduce.cuh"
#include "scale.cuh"
#include "table.h"

namespace wnkernel::cuda {

// A thread holds K vectors of N elements of each of R rows.
template <int N, int K>
struct Rows {
  static constexpr int R = K < kRowVectors ? kRowVectors / K : 1;

  static constexpr int kLogThreads = ceil_log2(kThreads);

  int threads;    // threads of a row
  int lane;       // number of this thread among them
  int groups;     // rows that the block takes at a time
  int64_t first;  // the first row of this thread
  int64_t rows;
  int64_t inner;
  int width;

  __device__ Rows(const Plan& p, int block) {
    const int log_x = K > kRowVectors ? kLogThreads : p.log_x;  // such a K takes all threads
    threads = 1 << log_x;
    lane = threadIdx.x & (threads - 1);
    groups = kThreads >> log_x;
    first = int64_t{block} * (groups * R) + (threadIdx.x >> log_x);
    rows = p.rows;
    inner = p.inner;
    width = static_cast<int>(p.width);
  }

  __device__ int64_t row(int r) const { return first + r * groups; }
  __device__ bool has_row(int r) const { return row(r) < rows; }
  __device__ bool has(int r, int k) const { return has_row(r) && lane + k * threads < width; }
  __device__ int64_t at(int r, int k) const { return row(r) * inner + (lane + k * threads) * N; }

  template <class T>
  __device__ void load_all(const void* p, Vector<T, N> (&x)[R][K]) const {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int k = 0; k < K; ++k)
        x[r][k] = has(r, k) ? load<N>(static_cast<const T*>(p) + at(r, k)) : zeros<T, N>();
  }

  // g is loaded together with the rows, before the first wait.
  template <class Line, class Sum>
  __device__ void load_g(const Line& line, Sum (&g)[R]) const {
    Held<Sum> held[R];
#pragma unroll
    for (int r = 0; r < R; ++r)
      held[r] = has_row(r) ? load_held<Sum>(line.g, line.g_type, row(r)) : 0;
#pragma unroll
    for (int r = 0; r < R; ++r) g[r] = value_of<Sum>(held[r], line.g_type);
  }
};

template <class V, class W, int N, int K>
__device__ inline void forward_rows(const ForwardLine& line, int block,
                                    typename Element<V>::Sum* scratch) {
  using Sum = typename Element<V>::Sum;
  using Place = Rows<N, K>;
  constexpr int R = Place::R;
  const Place place(line.plan, block);
  Vector<V, N> v[R][K];
  place.load_all(line.v, v);
  Sum g[R];
  place.load_g(line, g);

  Sum squares[R], unit[R];
#pragma unroll
  for (int r = 0; r < R; ++r) unit[r] = 1;
  for (bool again = false;; again = true) {  // extreme rows are scaled and added up again
    bool extreme = false;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      squares[r] = 0;
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const Sum x = widen(v[r][k].x[j]) * unit[r];
          squares[r] = fma(x, x, squares[r]);
        }
#pragma unroll
      for (int k = 0; k < K; ++k) forget_widened(v[r][k]);
      squares[r] = reduce_group(squares[r], place.threads, scratch, Add());
      if (!again && place.has_row(r)) unit[r] = unit_of(squares[r]);
      extreme |= unit[r] != 1;
    }
    if (again) break;
    if (!(place.threads > kWarp ? __syncthreads_or(extreme) : __any_sync(kAllLanes, extreme)))
      break;
  }

#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (!place.has_row(r)) continue;
    const auto f = Forwards<Sum>::of(squares[r], unit[r], g[r], line);
    if (place.lane == 0) static_cast<Sum*>(line.norm)[place.row(r)] = f.norm;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!place.has(r, k)) continue;
      Vector<W, N> w;
#pragma unroll
      for (int j = 0; j < N; ++j) w.x[j] = narrow<W>(widen(v[r][k].x[j]) * f.a * f.b);
      store(static_cast<W*>(line.w) + place.at(r, k), w);
    }
    if (!(line.forced > 0)) continue;
    const auto of_v = Forwards<Sum>::of_v(squares[r], unit[r], line);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!place.has(r, k)) continue;
      Vector<V, N> x;
#pragma unroll
      for (int j = 0; j < N; ++j) x.x[j] = narrow<V>(widen(v[r][k].x[j]) * of_v.a * of_v.b);
      store(static_cast<V*>(const_cast<void*>(line.v)) + place.at(r, k), x);
    }
  }
}

// One thread computes a row whose coefficients are not all normal numbers, from memory. Other rows
// are left alone.
template <class V, class W>
__device__ inline void backward_unusual(const BackwardLine& line, int64_t row) {
  using Sum = typename Element<V>::Sum;
  const Sum g = value_of<Sum>(load_held<Sum>(line.g, line.g_type, row), line.g_type);
  const auto b = Backwards<Sum>::of(static_cast<const Sum*>(line.norm)[row], line.eps);
  const auto ratio = b.ratio(g);
  if (b.rest == 1 && ratio.b == 1) return;
  const int64_t inner = line.plan.inner, start = row * inner;
  const V* v = static_cast<const V*>(line.v) + start;
  const W* grad_w = static_cast<const W*>(line.grad_w) + start;
  Sum s = 0;
  for (int64_t k = 0; k < inner; ++k) s = fma(Sum(widen(grad_w[k])), widen(v[k]) * b.inverse, s);
  s = b.dot(s);
  if (line.grad_g) store_as(line.grad_g, line.g_type, row, s);
  if (!line.grad_v) return;
  V* grad_v = static_cast<V*>(line.grad_v) + start;
  const Sum along = b.along(along_added<false>(s, line, row));
  for (int64_t k = 0; k < inner; ++k) {
    const Sum u = widen(v[k]) * b.inverse;
    grad_v[k] = narrow<V>(fma(-u, along, Sum(widen(grad_w[k]))) * ratio.a * ratio.b);
  }
}

template <class V, class W, int N, int K>
__device__ inline void backward_rows(const BackwardLine& line, int block,
                                     typename Element<V>::Sum* scratch) {
  using Sum = typename Element<V>::Sum;
  using Place = Rows<N, K>;
  constexpr int R = Place::R;
  const Place place(line.plan, block);
  Vector<V, N> v[R][K];
  Vector<W, N> grad[R][K];
  place.load_all(line.v, v);
  place.load_all(line.grad_w, grad);
  Sum norm[R];
#pragma unroll
  for (int r = 0; r < R; ++r)
    norm[r] = place.has_row(r) ? __ldg(static_cast<const Sum*>(line.norm) + place.row(r)) : Sum(1);
  Sum g[R];
  place.load_g(line, g);

#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t row = place.row(r);
    // No registers are left for the coefficients of rows at the ends of the range.
    const auto d = Divisor<Sum>::of(norm[r], line.eps);
    Sum s = 0;
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int j = 0; j < N; ++j)
        s = fma(Sum(widen(grad[r][k].x[j])), widen(v[r][k].x[j]) * d.inverse, s);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      forget_widened(v[r][k]);
      forget_widened(grad[r][k]);
    }
    s = reduce_group(s, place.threads, scratch, Add());
    if (!place.has_row(r) || !d.is_usual_under(g[r])) continue;
    if (line.grad_g && place.lane == 0) store_as(line.grad_g, line.g_type, row, s);
    if (!line.grad_v) continue;
    const Sum ratio = g[r] * d.inverse;
    s = along_added<true>(s, line, row);
    const Sum along = d.clamped ? Sum(0) : s;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!place.has(r, k)) continue;
      Vector<V, N> x;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const Sum u = widen(v[r][k].x[j]) * d.inverse;
        x.x[j] = narrow<V>(fma(-u, along, Sum(widen(grad[r][k].x[j]))) * ratio);
      }
      store(static_cast<V*>(line.grad_v) + place.at(r, k), x);
    }
  }
  // These rows come last, when no vectors occupy registers.
#pragma unroll 1
  for (int r = 0; r < R; ++r)
    if (place.lane == 0 && place.has_row(r)) backward_unusual<V, W>(line, place.row(r));
}

}  // namespace wnkernel::cuda
