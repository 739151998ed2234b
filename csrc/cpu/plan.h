// How one problem is cut into chunks. Where a sum begins and ends depends only on the shape of the
// problem, never on threads, neighbours or the machine. So results have the same bits alone, in a
// list and for any number of threads. The number of whole rows in a chunk changes no sum, so it
// follows the caches and threads. docs/performance.md explains the numbers.
#pragma once
#include <algorithm>

#include "../weight_norm.h"

namespace wnkernel::cpu {

// The number of elements in one chunk of a long row.
constexpr int64_t kChunk = 16384;
// A row, or a strip of columns, of up to this many elements is done in one phase.
constexpr int64_t kOnePhase = 65536;
// Shorter runs are summed down the columns of strips, across rows, instead of one by one.
constexpr int64_t kShortRun = 256;
// The largest number of columns of a strip: its coefficients fit into the first-level cache.
constexpr int64_t kMaxColumns = 2048;
constexpr int64_t kMinColumns = 64;
// Narrower strips would jump through memory too often; two phases read it as a stream instead.
constexpr int64_t kMinStrip = 1024;
// The number of elements in a chunk of a two-phase strip, and the most terms of one float sum down
// a column. (One-phase strips may have up to kOnePhase / kMinColumns terms.)
constexpr int64_t kStripChunk = 65536;
constexpr int64_t kMaxTerms = 256;
// The number of rows whose sums and coefficients a thread keeps at a time.
constexpr int64_t kMaxRows = 256;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan {
  enum class Kind : uint8_t {
    rows,    // adjacent whole rows, summed run by run; one phase
    runs,    // some runs, or a part of one run, of a row that is too long for one chunk; two phases
    strips,  // rows of many short runs, summed down the columns of strips; one or two phases
  };
  Kind kind;
  bool one_phase;
  RowView view;
  int64_t tasks;           // number of chunks; each has one reduction and one map
  int64_t rows_per_task;   // strips: adjacent rows in one chunk
  int64_t strips;          // strips side by side
  int64_t outer_per_task;  // short runs, strips: rows of memory in one chunk
  int64_t outer_blocks;    // chunks down the outer dimension, each with a partial sum per row
  int64_t chunks_per_run;  // long runs: chunks in one run
  int64_t repeat;          // strips: rows of memory side by side in one super-row

  // The first row of a chunk of whole rows. The first row of the chunk after the last is the number
  // of rows.
  int64_t first_row(int64_t task) const {
    return view.rows / tasks * task + view.rows % tasks * task / tasks;
  }
  // The number of columns of one super-row; for runs, the number of rows.
  int64_t coefficients() const {
    return kind == Kind::strips ? repeat * view.rows * view.inner : view.rows;
  }
  int64_t partials() const { return kind == Kind::strips ? outer_blocks * coefficients() : tasks; }
  // The number of rows whose partial sums are added up together.
  int64_t finish_rows() const { return kind == Kind::strips ? rows_per_task : kMaxRows; }
  // Doubles of workspace: row sums, partial sums and two coefficients; see job.h.
  int64_t workspace() const { return one_phase ? 0 : view.rows + partials() + 2 * coefficients(); }
};

inline Plan plan_rows(const RowView& view, int64_t chunks) {
  Plan p{};
  p.kind = Plan::Kind::rows;
  p.one_phase = true;
  p.view = view;
  p.tasks = std::min(chunks, view.rows);
  return p;
}

inline Plan plan_runs(const RowView& view) {
  Plan p{};
  p.kind = Plan::Kind::runs;
  p.view = view;
  p.outer_per_task = std::max<int64_t>(1, kChunk / view.inner);
  p.outer_blocks = ceil_div(view.outer, p.outer_per_task);
  p.chunks_per_run = ceil_div(view.inner, kChunk);
  p.tasks = view.rows * p.outer_blocks * p.chunks_per_run;
  return p;
}

inline Plan plan_strips(const RowView& view) {
  Plan p{};
  p.kind = Plan::Kind::strips;
  p.view = view;
  p.chunks_per_run = 1;
  const int64_t columns = view.rows * view.inner;
  p.repeat = columns >= kMinColumns ? 1 : 16 * ceil_div(kMinColumns, 16 * columns);
  const int64_t super_rows = ceil_div(view.outer, p.repeat);
  const auto rows_within = [&](int64_t width) {
    return p.repeat > 1 ? view.rows : std::clamp<int64_t>(width / view.inner, 1, view.rows);
  };
  const auto width = [&] { return p.repeat * p.rows_per_task * view.inner; };
  p.rows_per_task = rows_within(std::min(kMaxColumns, std::max(kMinStrip, kOnePhase / super_rows)));
  p.one_phase = width() * super_rows <= kOnePhase;
  if (!p.one_phase) p.rows_per_task = rows_within(kMaxColumns);
  const int64_t terms = std::clamp<int64_t>(kStripChunk / width(), 1, kMaxTerms);
  p.strips = ceil_div(view.rows, p.rows_per_task);
  p.rows_per_task = ceil_div(view.rows, p.strips);  // equally wide strips
  p.outer_per_task = p.one_phase ? view.outer : p.repeat * terms;
  p.outer_blocks = ceil_div(view.outer, p.outer_per_task);
  p.tasks = p.strips * p.outer_blocks;
  return p;
}

// chunks is the number of chunks if whole rows make them. A chunk has at most kMaxRows rows.
inline Plan make_plan(const RowView& view, int64_t chunks) {
  if (view.outer > 1 && view.rows > 1 && view.inner < kShortRun) return plan_strips(view);
  return view.row_size() <= kOnePhase ? plan_rows(view, chunks) : plan_runs(view);
}

}  // namespace wnkernel::cpu
