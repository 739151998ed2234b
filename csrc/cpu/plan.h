// How one problem is cut into chunks. Where a sum begins and ends depends on the problem's own
// shape only, never on threads, neighbours or the machine: that is what makes results bit-identical
// alone, grouped and for any number of threads. How many whole rows make a chunk is no matter of
// sums: that goes by caches and threads. The numbers are explained in docs/performance.md.
#pragma once
#include <algorithm>

#include "../weight_norm.h"

namespace wnkernel::cpu {

// Elements of one piece of a long row.
constexpr int64_t kChunk = 16384;
// A row, or a strip of columns, of up to this many elements is still done in one phase.
constexpr int64_t kOnePhase = 65536;
// Runs shorter than this are reduced down the columns, across rows, instead of along the run.
constexpr int64_t kShortRun = 256;
// Width of a strip of columns: its coefficients stay in the first-level cache.
constexpr int64_t kMaxColumns = 2048;
constexpr int64_t kMinColumns = 64;
// Narrower strips are not worth their jumps through memory: two phases stream instead.
constexpr int64_t kMinStrip = 1024;
// Two-phase strips: elements of a chunk, and the most terms of one float sum down a column
// (one-phase strips may have up to kOnePhase / kMinColumns).
constexpr int64_t kStripChunk = 65536;
constexpr int64_t kMaxTerms = 256;
// Rows whose sums and coefficients a thread keeps at a time.
constexpr int64_t kMaxRows = 256;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan {
  enum class Kind : uint8_t {
    rows,     // adjacent rows, reduced along the run; one phase
    pieces,   // rows too long for one chunk, cut into pieces; two phases
    columns,  // many short runs per row, reduced down strips of columns; one or two phases
  };
  Kind kind;
  bool one_phase;
  RowView view;
  int64_t tasks;           // chunks, each with one reduction and one map
  int64_t rows_per_task;   // columns: adjacent rows of one chunk
  int64_t row_blocks;      // columns: strips
  int64_t outer_per_task;  // pieces with short runs, columns: rows of memory of one chunk
  int64_t outer_blocks;    // chunks down the outer dimension: partial sums of a row
  int64_t run_pieces;      // pieces with long runs: chunks of one run
  int64_t repeat;          // columns: rows of memory side by side in one super-row

  // The first row of a chunk of whole rows; that of the chunk behind the last is the number of
  // rows.
  int64_t first_row(int64_t task) const {
    return view.rows / tasks * task + view.rows % tasks * task / tasks;
  }
  // Columns of one super-row; for pieces, the rows.
  int64_t coefficients() const {
    return kind == Kind::columns ? repeat * view.rows * view.inner : view.rows;
  }
  int64_t partials() const { return kind == Kind::columns ? outer_blocks * coefficients() : tasks; }
  // Rows whose partial sums are added up together.
  int64_t finish_rows() const { return kind == Kind::columns ? rows_per_task : kMaxRows; }
  // Doubles of workspace: sums, partial sums and two coefficients; see job.h.
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

inline Plan plan_pieces(const RowView& view) {
  Plan p{};
  p.kind = Plan::Kind::pieces;
  p.view = view;
  p.outer_per_task = std::max<int64_t>(1, kChunk / view.inner);
  p.outer_blocks = ceil_div(view.outer, p.outer_per_task);
  p.run_pieces = ceil_div(view.inner, kChunk);
  p.tasks = view.rows * p.outer_blocks * p.run_pieces;
  return p;
}

inline Plan plan_columns(const RowView& view) {
  Plan p{};
  p.kind = Plan::Kind::columns;
  p.view = view;
  p.run_pieces = 1;
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
  p.row_blocks = ceil_div(view.rows, p.rows_per_task);
  p.rows_per_task = ceil_div(view.rows, p.row_blocks);  // as wide, all of them
  p.outer_per_task = p.one_phase ? view.outer : p.repeat * terms;
  p.outer_blocks = ceil_div(view.outer, p.outer_per_task);
  p.tasks = p.row_blocks * p.outer_blocks;
  return p;
}

// chunks: how many, if they are of whole rows, of at most kMaxRows each.
inline Plan make_plan(const RowView& view, int64_t chunks) {
  if (view.outer > 1 && view.rows > 1 && view.inner < kShortRun) return plan_columns(view);
  return view.row_size() <= kOnePhase ? plan_rows(view, chunks) : plan_pieces(view);
}

}  // namespace wnkernel::cpu
