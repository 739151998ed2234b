// Runs a table of problems: cuts every problem by its plan, spreads all chunks evenly over the
// threads, and keeps the order of every sum fixed.
//
// Phase 1: one-phase chunks whole; partial sums of the others.     bytes: all of it, or v (+
// grad_w) Phase 2: partial sums -> row sums -> norms and coefficients.     bytes: almost none Phase
// 3: the map of the others, last chunk first: it is the one that the cache still holds. Phase 4:
// rows that leave the float range, again, exactly.        usually none
#include <atomic>
#include <type_traits>
#include <utility>
#include <vector>

#include "elements.h"
#include "exact_rows.h"
#include "instruction_set.h"
#include "plan.h"
#include "primitives.h"

namespace wnkernel::cpu {
namespace {

// Below this many elements per thread, waking another thread costs more than it saves.
constexpr int64_t kThreadGrain = 16384;

// Results larger than this are not found in a cache when they are read again: writing them past it
// saves reading every line first (measured from 6 MiB up: forward 10 %, backward 25 %; below, a
// loss).
constexpr int64_t kStreamBytes = 6 << 20;

int index(DType t) { return static_cast<int>(t); }
const char* at(const void* p, int64_t k, DType t) {
  return static_cast<const char*>(p) + k * element_size(t);
}
char* at(void* p, int64_t k, DType t) { return static_cast<char*>(p) + k * element_size(t); }

// What differs between the directions: see primitives.h for x, y and out.
const Kernels& kernels(const InstructionSet& set, const Forward& p) {
  return set.forward[index(p.v_type)][index(p.w_type)];
}
const Kernels& kernels(const InstructionSet& set, const Backward& p) {
  return set.backward[index(p.v_type)][index(p.w_type)];
}
const char* x_at(const Forward& p, int64_t k) { return at(p.v, k, p.v_type); }
const char* x_at(const Backward& p, int64_t k) { return at(p.grad_w, k, p.w_type); }
char* out_at(const Forward& p, int64_t k) { return at(p.w, k, p.w_type); }
char* out_at(const Backward& p, int64_t k) { return at(p.grad_v, k, p.v_type); }
DType out_type(const Forward& p) { return p.w_type; }
DType out_type(const Backward& p) { return p.v_type; }
bool wants_map(const Forward&) { return true; }
bool wants_map(const Backward& p) { return p.grad_v != nullptr; }
DType accumulation(DType v_type) { return v_type == DType::f64 ? DType::f64 : DType::f32; }

int64_t finish(const InstructionSet& set, const Forward& p, int64_t row, int64_t rows, double* sums,
               void* a, void*) {
  return set.finish[index(p.v_type)][index(p.g_type)].forward(
      sums, at(p.g, row, p.g_type), rows, p.eps, at(p.norm, row, accumulation(p.v_type)), a);
}
int64_t finish(const InstructionSet& set, const Backward& p, int64_t row, int64_t rows,
               double* sums, void* a, void* b) {
  return set.finish[index(p.v_type)][index(p.g_type)].backward(
      sums, at(p.g, row, p.g_type), at(p.norm, row, accumulation(p.v_type)), rows, p.eps,
      p.grad_g ? at(p.grad_g, row, p.g_type) : nullptr, a, b);
}

template <class P>
void exact_rows(const P& p, const double* sums, int64_t row, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    if (sums[r] != sums[r]) exact_row(p, row + r);
}

template <class P>
struct Job {
  const P* p = nullptr;
  Plan plan{};
  const Kernels* k = nullptr;
  DType acc{};
  double* partials = nullptr;  // [outer_blocks * run_pieces][rows]
  double* sums = nullptr;      // [rows]
  char* a = nullptr;           // [rows] of acc
  char* b = nullptr;
};

// A strip of columns times some rows of memory; see Plan.
struct Strip {
  int64_t row, rows;             // rows of the problem
  int64_t outer, outers;         // rows of memory
  int64_t columns, stride;       // per row of memory, in elements
  int64_t super_rows, leftover;  // full super-rows, rows of memory in the last, partial one
};

template <class P>
class Launch {
 public:
  Launch(const P* problems, int64_t count, const Threads& threads)
      : set_(instruction_set()), threads_(threads), many_(count > 1 ? count : 0) {
    jobs_ = count > 1 ? many_.data() : &single_;
    count_ = count;
    size_t doubles = 0;
    int64_t bytes = 0;
    for (int64_t k = 0; k < count; ++k) {
      Job<P>& job = jobs_[k];
      job.p = problems + k;
      job.plan = make_plan(problems[k].view);
      job.k = &kernels(set_, problems[k]);
      job.acc = accumulation(problems[k].v_type);
      elements_ += problems[k].view.numel();
      bytes += problems[k].view.numel() * element_size(out_type(problems[k]));
      if (!job.plan.one_phase) doubles += job.plan.partials() + 3 * job.plan.view.rows;
    }
    stream_ = bytes >= kStreamBytes;
    if (doubles == 0) return;
    workspace_.resize(doubles);
    double* free = workspace_.data();
    const auto take = [&](int64_t n) { return std::exchange(free, free + n); };
    for (int64_t k = 0; k < count; ++k) {
      Job<P>& job = jobs_[k];
      if (job.plan.one_phase) continue;
      two_phase_ = true;
      job.partials = take(job.plan.partials());
      job.sums = take(job.plan.view.rows);
      job.a = reinterpret_cast<char*>(take(job.plan.view.rows));
      job.b = reinterpret_cast<char*>(take(job.plan.view.rows));
    }
  }

  void run() {
    each_chunk<false>([this](const Job<P>& job, int64_t task) { reduce(job, task); });
    if (!two_phase_) return;
    finish_rows();
    each_chunk<true>([this](const Job<P>& job, int64_t task) {
      if (!job.plan.one_phase && wants_map(*job.p)) map(job, task);
    });
    if (unsafe_.load() == 0) return;
    each_row_block([](const Job<P>& job, int64_t row, int64_t rows) {
      exact_rows(*job.p, job.sums + row, row, rows);
    });
  }

 private:
  // body(job, task) for every chunk of every job. Thread t takes the chunks that start in its share
  // of all elements, so the threads' shares are even and neighbours in memory.
  template <bool reversed, class F>
  void each_chunk(F&& body) {
    const int64_t parts =
        std::clamp<int64_t>(elements_ / kThreadGrain, 1, std::max(1, threads_.threads));
    const auto share = [&](int part) {
      const int64_t from = elements_ * part / parts, to = elements_ * (part + 1) / parts;
      int64_t start = reversed ? elements_ : 0;
      for (int64_t j = 0; j < count_; ++j) {
        const Job<P>& job = jobs_[reversed ? count_ - 1 - j : j];
        const int64_t size = job.plan.view.numel();
        if (reversed) start -= size;
        const int64_t first = first_chunk(job, start, from), last = first_chunk(job, start, to);
        for (int64_t k = first; k < last; ++k) body(job, reversed ? first + last - 1 - k : k);
        if (!reversed) start += size;
      }
    };
    parallel(parts, share);
  }

  // The first chunk of a job, whose elements begin at `start` of all, that begins at `limit` or
  // later.
  static int64_t first_chunk(const Job<P>& job, int64_t start, int64_t limit) {
    if (limit <= start) return 0;
    const auto tasks = static_cast<unsigned __int128>(job.plan.tasks);
    const auto size = static_cast<unsigned __int128>(job.plan.view.numel());
    const auto first = ((limit - start) * tasks + size - 1) / size;
    return first < tasks ? static_cast<int64_t>(first) : job.plan.tasks;
  }

  // body(job, row, rows) for blocks of rows of every two-phase job.
  template <class F>
  void each_row_block(F&& body) {
    struct Block {
      const Job<P>* job;
      int64_t row;
    };
    std::vector<Block> blocks;
    for (int64_t k = 0; k < count_; ++k)
      if (const Job<P>& job = jobs_[k]; !job.plan.one_phase)
        for (int64_t row = 0; row < job.plan.view.rows; row += kMaxRows)
          blocks.push_back({&job, row});
    const int64_t count = static_cast<int64_t>(blocks.size());
    const int64_t parts = std::min<int64_t>(count, std::max(1, threads_.threads));
    parallel(parts, [&](int part) {
      for (int64_t k = count * part / parts; k < count * (part + 1) / parts; ++k) {
        const Block& block = blocks[k];
        body(*block.job, block.row, std::min(kMaxRows, block.job->plan.view.rows - block.row));
      }
    });
  }

  template <class F>
  void parallel(int64_t parts, const F& body) {
    if (parts == 1) return body(0);
    const auto call = [](void* f, int part) { (*static_cast<const F*>(f))(part); };
    threads_.run(static_cast<int>(parts), call, const_cast<F*>(&body));
  }

  void reduce(const Job<P>& job, int64_t task) {
    switch (job.plan.kind) {
      case Plan::Kind::rows:
        return whole_rows(job, task);
      case Plan::Kind::pieces:
        return piece_sum(job, task);
      case Plan::Kind::columns:
        return job.plan.one_phase ? whole_strip(job, task) : strip_sum(job, task);
    }
  }

  void map(const Job<P>& job, int64_t task) {
    if (job.plan.kind == Plan::Kind::pieces) return piece_map(job, task);
    const Strip strip = strip_of(job.plan, task);
    map_strip(job, strip, at(job.a, strip.row, job.acc), at(job.b, strip.row, job.acc));
  }

  void finish_rows() {
    each_row_block([this](const Job<P>& job, int64_t row, int64_t rows) {
      const int64_t all_rows = job.plan.view.rows, chunks = job.plan.partials() / all_rows;
      double* sums = job.sums + row;
      std::fill(sums, sums + rows, 0.0);
      for (int64_t c = 0; c < chunks; ++c)
        for (int64_t r = 0; r < rows; ++r) sums[r] += job.partials[c * all_rows + row + r];
      const int64_t bad =
          finish(set_, *job.p, row, rows, sums, at(job.a, row, job.acc), at(job.b, row, job.acc));
      if (bad) unsafe_.fetch_add(bad);
    });
  }

  void whole_rows(const Job<P>& job, int64_t task) {
    const P& p = *job.p;
    const RowView& view = p.view;
    const int64_t row = task * job.plan.rows_per_task;
    const int64_t rows = std::min(job.plan.rows_per_task, view.rows - row);
    double sums[kMaxRows], a[kMaxRows], b[kMaxRows];
    std::fill(sums, sums + rows, 0.0);
    for (int64_t o = 0; o < view.outer; ++o) {
      const int64_t k = (o * view.rows + row) * view.inner;
      job.k->dot_rows(x_at(p, k), at(p.v, k, p.v_type), rows, view.inner, sums);
    }
    const int64_t unsafe = finish(set_, p, row, rows, sums, a, b);
    if (wants_map(p)) {
      for (int64_t o = 0; o < view.outer; ++o) {
        const int64_t k = (o * view.rows + row) * view.inner;
        job.k->map_rows(x_at(p, k), at(p.v, k, p.v_type), out_at(p, k), rows, view.inner, a, b,
                        stream_);
      }
    }
    if (unsafe) exact_rows(p, sums, row, rows);
  }

  // f(first element, elements) for every run of one piece of one row.
  template <class F>
  static void each_run(const Plan& plan, int64_t row, int64_t piece, F&& f) {
    const RowView& view = plan.view;
    const int64_t first = piece / plan.run_pieces * plan.outer_per_task;
    const int64_t last = std::min(view.outer, first + plan.outer_per_task);
    const int64_t from = piece % plan.run_pieces * kChunk;
    const int64_t size = std::min(view.inner - from, plan.run_pieces > 1 ? kChunk : view.inner);
    for (int64_t o = first; o < last; ++o) f((o * view.rows + row) * view.inner + from, size);
  }

  void piece_sum(const Job<P>& job, int64_t task) {
    const P& p = *job.p;
    const int64_t pieces = job.plan.tasks / p.view.rows, row = task / pieces, piece = task % pieces;
    double sum = 0;
    each_run(job.plan, row, piece, [&](int64_t k, int64_t n) {
      job.k->dot_rows(x_at(p, k), at(p.v, k, p.v_type), 1, n, &sum);
    });
    job.partials[piece * p.view.rows + row] = sum;
  }

  void piece_map(const Job<P>& job, int64_t task) {
    const P& p = *job.p;
    const int64_t pieces = job.plan.tasks / p.view.rows, row = task / pieces, piece = task % pieces;
    const char *a = at(job.a, row, job.acc), *b = at(job.b, row, job.acc);
    each_run(job.plan, row, piece, [&](int64_t k, int64_t n) {
      job.k->map_rows(x_at(p, k), at(p.v, k, p.v_type), out_at(p, k), 1, n, a, b, stream_);
    });
  }

  static Strip strip_of(const Plan& plan, int64_t task) {
    Strip s{};
    s.row = task % plan.row_blocks * plan.rows_per_task;
    s.rows = std::min(plan.rows_per_task, plan.view.rows - s.row);
    s.outer = task / plan.row_blocks * plan.outer_per_task;
    s.outers = std::min(plan.outer_per_task, plan.view.outer - s.outer);
    s.columns = s.rows * plan.view.inner;
    s.stride = plan.view.rows * plan.view.inner;
    s.super_rows = s.outers / plan.repeat;
    s.leftover = s.outers % plan.repeat;
    return s;
  }

  // Row sums of a strip, from sums down its columns in the accumulation type.
  void sum_strip(const Job<P>& job, const Strip& s, double* sums) {
    if (job.acc == DType::f64) return sum_strip_in<double>(job, s, sums);
    sum_strip_in<float>(job, s, sums);
  }

  template <class A>
  void sum_strip_in(const Job<P>& job, const Strip& s, double* sums) {
    const P& p = *job.p;
    const int64_t repeat = job.plan.repeat, inner = p.view.inner;
    A columns[kMaxColumns];
    std::fill(columns, columns + repeat * s.columns, A(0));
    int64_t k = s.outer * s.stride + s.row * inner;
    job.k->dot_columns(x_at(p, k), at(p.v, k, p.v_type), s.super_rows, repeat * s.stride,
                       repeat * s.columns, columns);
    k += s.super_rows * repeat * s.stride;
    if (s.leftover)
      job.k->dot_columns(x_at(p, k), at(p.v, k, p.v_type), 1, 0, s.leftover * s.columns, columns);
    std::fill(sums, sums + s.rows, 0.0);
    const A* column = columns;
    for (int64_t j = 0; j < repeat; ++j)
      for (int64_t r = 0; r < s.rows; ++r)
        for (int64_t i = 0; i < inner; ++i) sums[r] += *column++;
  }

  void map_strip(const Job<P>& job, const Strip& s, const void* a, const void* b) {
    if (job.acc == DType::f64) return map_strip_in<double>(job, s, a, b);
    map_strip_in<float>(job, s, a, b);
  }

  template <class A>
  void map_strip_in(const Job<P>& job, const Strip& s, const void* a_, const void* b_) {
    const P& p = *job.p;
    const int64_t repeat = job.plan.repeat, inner = p.view.inner;
    constexpr bool backward = std::is_same_v<P, Backward>;
    const A *a = static_cast<const A*>(a_), *b = static_cast<const A*>(b_);
    A a_columns[kMaxColumns], b_columns[kMaxColumns];
    if (repeat * inner > 1) {
      for (int64_t j = 0, c = 0; j < repeat; ++j)
        for (int64_t r = 0; r < s.rows; ++r)
          for (int64_t i = 0; i < inner; ++i, ++c) {
            a_columns[c] = a[r];
            if (backward) b_columns[c] = b[r];
          }
      a = a_columns;
      b = b_columns;
    }
    int64_t k = s.outer * s.stride + s.row * inner;
    job.k->map_columns(x_at(p, k), at(p.v, k, p.v_type), out_at(p, k), s.super_rows,
                       repeat * s.stride, repeat * s.columns, a, b, stream_);
    k += s.super_rows * repeat * s.stride;
    if (s.leftover)
      job.k->map_columns(x_at(p, k), at(p.v, k, p.v_type), out_at(p, k), 1, 0,
                         s.leftover * s.columns, a, b, stream_);
  }

  void whole_strip(const Job<P>& job, int64_t task) {
    const Strip s = strip_of(job.plan, task);
    double sums[kMaxColumns], a[kMaxColumns], b[kMaxColumns];
    sum_strip(job, s, sums);
    const int64_t unsafe = finish(set_, *job.p, s.row, s.rows, sums, a, b);
    if (wants_map(*job.p)) map_strip(job, s, a, b);
    if (unsafe) exact_rows(*job.p, sums, s.row, s.rows);
  }

  void strip_sum(const Job<P>& job, int64_t task) {
    const Strip s = strip_of(job.plan, task);
    sum_strip(job, s, job.partials + task / job.plan.row_blocks * job.plan.view.rows + s.row);
  }

  const InstructionSet& set_;
  const Threads& threads_;
  Job<P> single_;  // the table of one needs no memory
  std::vector<Job<P>> many_;
  Job<P>* jobs_;
  int64_t count_;
  std::vector<double> workspace_;
  int64_t elements_ = 0;
  bool two_phase_ = false;
  bool stream_ = false;
  std::atomic<int64_t> unsafe_{0};
};

}  // namespace
}  // namespace wnkernel::cpu

namespace wnkernel {

void forward_cpu(const Forward* problems, int64_t count, const Threads& threads) {
  cpu::Launch<Forward>(problems, count, threads).run();
}

void backward_cpu(const Backward* problems, int64_t count, const Threads& threads) {
  cpu::Launch<Backward>(problems, count, threads).run();
}

}  // namespace wnkernel
