// Chunks that are summed run by run: adjacent whole rows, and runs of long rows. A run is a stretch
// of a row without gaps. If a stretch is longer than a chunk, each chunk's part of it is a run.
#pragma once
#include <algorithm>

#include "job.h"

namespace wnkernel::cpu {

// Requests the cache lines that are written first, so that they arrive while the coefficients are
// computed. The number of lines is what a core can have in flight.
inline void ask_for_lines(const char* out, int64_t bytes) {
  constexpr int64_t kLines = 16, kLine = 64;
  for (const char* end = out + std::min(bytes, kLines * kLine); out < end; out += kLine) {
#if defined(__x86_64__)  // compilers make a prefetch for reading of the builtin, or nothing
    asm volatile("prefetchw %0" : : "m"(*out));
#else
    __builtin_prefetch(out, /*for writing*/ 1);
#endif
  }
}

// Computes several whole rows, from v to every output.
template <class P>
void whole_rows(const Job<P>& job, int64_t task) {
  const RowView& view = job.plan.view;
  const int64_t row = job.plan.first_row(task), rows = job.plan.first_row(task + 1) - row;
  double sums[kMaxRows], a[kMaxRows], b[kMaxRows];
  std::fill(sums, sums + rows, 0.0);
  for (int64_t o = 0; o < view.outer; ++o) {
    const int64_t k = (o * view.rows + row) * view.inner;
    job.k->dot_rows(job.x(k), job.y(k), rows, view.inner, sums);
  }
  if (wants_map(*job.p) && !job.stream)
    ask_for_lines(job.out(row * view.inner), rows * view.inner * bytes_written(*job.p));
  const int64_t unsafe = finish(*job.set, *job.p, row, rows, sums, a, b);
  if (wants_map(*job.p))
    for (int64_t o = 0; o < view.outer; ++o) {
      const int64_t k = (o * view.rows + row) * view.inner;
      job.map_rows(k, rows, view.inner, a, b);
    }
  if (unsafe) exact_rows(*job.p, sums, row, rows);
}

// Calls f(row, first element, number of elements) for every run of one chunk.
template <class F>
void each_run(const Plan& plan, int64_t task, F&& f) {
  const RowView& view = plan.view;
  const int64_t chunks = plan.tasks / view.rows, row = task / chunks, chunk = task % chunks;
  const int64_t first = chunk / plan.chunks_per_run * plan.outer_per_task;
  const int64_t last = std::min(view.outer, first + plan.outer_per_task);
  const int64_t from = chunk % plan.chunks_per_run * kChunk;
  const int64_t size = std::min(view.inner - from, plan.chunks_per_run > 1 ? kChunk : view.inner);
  for (int64_t o = first; o < last; ++o) f(row, (o * view.rows + row) * view.inner + from, size);
}

template <class P>
void runs_sum(const Job<P>& job, int64_t task) {
  double& sum = reinterpret_cast<double*>(job.partials)[task];  // [rows][chunks]
  sum = 0;
  each_run(job.plan, task,
           [&](int64_t, int64_t k, int64_t n) { job.k->dot_rows(job.x(k), job.y(k), 1, n, &sum); });
}

template <class P>
int64_t runs_finish(const Job<P>& job, int64_t row, int64_t rows) {
  const int64_t chunks = job.plan.tasks / job.plan.view.rows;
  const double* partial = reinterpret_cast<const double*>(job.partials) + row * chunks;
  for (int64_t r = row; r < row + rows; ++r) {
    job.sums[r] = 0;
    for (int64_t k = 0; k < chunks; ++k) job.sums[r] += *partial++;
  }
  return finish(*job.set, *job.p, row, rows, job.sums + row, at(job.a, row, job.acc),
                at(job.b, row, job.acc));
}

template <class P>
void runs_map(const Job<P>& job, int64_t task) {
  each_run(job.plan, task, [&](int64_t row, int64_t k, int64_t n) {
    job.map_rows(k, 1, n, at(job.a, row, job.acc), at(job.b, row, job.acc));
  });
}

}  // namespace wnkernel::cpu
