// Chunks that are summed down the columns of memory: rows of many short runs. A strip is a band of
// adjacent columns that belong to some adjacent rows of the problem; it is as high as a chunk may
// be. A narrow problem (fewer than kMinColumns columns) puts `repeat` rows of memory side by side
// into one super-row.
#pragma once
#include <algorithm>

#include "job.h"

namespace wnkernel::cpu {

struct Strip {
  int64_t row, rows;             // rows of the problem
  int64_t element;               // the first element
  int64_t columns, stride;       // per row of memory, in elements
  int64_t super_rows, leftover;  // full super-rows, and the rows of memory in a last partial one
};

inline Strip strip_of(const Plan& plan, int64_t task) {
  const RowView& view = plan.view;
  Strip s{};
  s.row = task % plan.strips * plan.rows_per_task;
  s.rows = std::min(plan.rows_per_task, view.rows - s.row);
  const int64_t outer = task / plan.strips * plan.outer_per_task;
  const int64_t outers = std::min(plan.outer_per_task, view.outer - outer);
  s.columns = s.rows * view.inner;
  s.stride = view.rows * view.inner;
  s.element = outer * s.stride + s.row * view.inner;
  s.super_rows = outers / plan.repeat;
  s.leftover = outers % plan.repeat;
  return s;
}

// Sets sums[c] to the sum down column c of a strip, for all repeat * columns of a super-row. sums
// has the accumulation type.
template <class P>
void column_sums(const Job<P>& job, const Strip& s, char* sums) {
  const int64_t repeat = job.plan.repeat;
  std::fill(sums, at(sums, repeat * s.columns, job.acc), char{0});
  int64_t k = s.element;
  job.k->dot_columns(job.x(k), job.y(k), s.super_rows, repeat * s.stride, repeat * s.columns, sums);
  k += s.super_rows * repeat * s.stride;
  if (s.leftover) job.k->dot_columns(job.x(k), job.y(k), 1, 0, s.leftover * s.columns, sums);
}

// Maps a strip with one coefficient per column of a super-row.
template <class P>
void map_columns(const Job<P>& job, const Strip& s, const void* a, const void* b) {
  const int64_t repeat = job.plan.repeat;
  int64_t k = s.element;
  job.map_columns(k, s.super_rows, repeat * s.stride, repeat * s.columns, a, b);
  k += s.super_rows * repeat * s.stride;
  if (s.leftover) job.map_columns(k, 1, 0, s.leftover * s.columns, a, b);
}

// Calls f(A{}) with the accumulation type A of the job.
template <class P, class F>
decltype(auto) with_accumulation(const Job<P>& job, F&& f) {
  return job.acc == DType::f64 ? f(double{}) : f(float{});
}

// Adds the columns of row r in one row of memory to sums[r].
template <class T>
void add_columns_of_rows(const T* columns, int64_t rows, int64_t inner, double* sums) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < inner; ++i) sums[r] += *columns++;
}

// Sets columns[c] to the coefficient of the row of column c, in one row of memory.
template <class A>
void spread_over_columns(const A* rows_, int64_t rows, int64_t inner, A* columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < inner; ++i) *columns++ = rows_[r];
}

// Computes a strip that has all rows of memory, from v to every output.
template <class P>
void whole_strip(const Job<P>& job, int64_t task) {
  const Strip s = strip_of(job.plan, task);
  with_accumulation(job, [&](auto tag) {
    using A = decltype(tag);
    const int64_t repeat = job.plan.repeat, inner = job.plan.view.inner;
    double sums[kMaxColumns];
    A columns[kMaxColumns], a[kMaxColumns], b[kMaxColumns], b_columns[kMaxColumns];
    column_sums(job, s, reinterpret_cast<char*>(columns));
    std::fill(sums, sums + s.rows, 0.0);
    for (int64_t j = 0; j < repeat; ++j)
      add_columns_of_rows(columns + j * s.columns, s.rows, inner, sums);
    const int64_t unsafe = finish(*job.set, *job.p, s.row, s.rows, sums, a, b);
    if (wants_map(*job.p)) {
      A* const a_columns = columns;  // the sums are not needed any more
      for (int64_t j = 0; j < repeat; ++j) {
        spread_over_columns(a, s.rows, inner, a_columns + j * s.columns);
        if (job.has_b()) spread_over_columns(b, s.rows, inner, b_columns + j * s.columns);
      }
      map_columns(job, s, a_columns, b_columns);
    }
    if (unsafe) exact_rows(*job.p, sums, s.row, s.rows);
  });
}

// These functions do two-phase strips. partials is [outer_blocks][repeat * columns of all rows]; a
// and b have one super-row. With repeat > 1 a strip has all rows, so that a super-row is contiguous
// in all of them.
template <class P>
void strip_sum(const Job<P>& job, int64_t task) {
  const Strip s = strip_of(job.plan, task);
  const int64_t block = task / job.plan.strips, inner = job.plan.view.inner;
  column_sums(job, s,
              at(job.partials, block * job.plan.repeat * s.stride + s.row * inner, job.acc));
}

template <class P>
int64_t strip_finish(const Job<P>& job, int64_t row, int64_t rows) {
  return with_accumulation(job, [&](auto tag) {
    using A = decltype(tag);
    const int64_t repeat = job.plan.repeat, inner = job.plan.view.inner, columns = rows * inner;
    const int64_t stride = job.plan.view.rows * inner;  // of one row of memory
    const A* partials = reinterpret_cast<const A*>(job.partials) + row * inner;
    double sums[kMaxColumns] = {};  // sums down the columns
    for (int64_t k = 0; k < job.plan.outer_blocks * repeat; ++k)
      for (int64_t c = 0; c < columns; ++c) sums[c] += partials[k * stride + c];
    std::fill(job.sums + row, job.sums + row + rows, 0.0);
    add_columns_of_rows(sums, rows, inner, job.sums + row);
    A a[kMaxColumns], b[kMaxColumns];
    const int64_t unsafe = finish(*job.set, *job.p, row, rows, job.sums + row, a, b);
    for (int64_t j = 0; j < repeat; ++j) {
      const int64_t at_columns = j * stride + row * inner;
      spread_over_columns(a, rows, inner, reinterpret_cast<A*>(job.a) + at_columns);
      if (job.has_b())
        spread_over_columns(b, rows, inner, reinterpret_cast<A*>(job.b) + at_columns);
    }
    return unsafe;
  });
}

template <class P>
void strip_map(const Job<P>& job, int64_t task) {
  const Strip s = strip_of(job.plan, task);
  const int64_t column = s.row * job.plan.view.inner;
  map_columns(job, s, at(job.a, column, job.acc), at(job.b, column, job.acc));
}

}  // namespace wnkernel::cpu
