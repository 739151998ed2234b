// Runs a table of problems: cuts every problem by its plan, spreads all chunks evenly over the
// threads, and keeps the order of every sum fixed. Problems that are read twice run in batches that
// a cache can hold, one batch after the other.
//
// Phase 1 does one-phase chunks from v to every output, and makes partial sums of the others. It
// moves all bytes of the former and the inputs of the latter. A backward begins with the last
// chunk, because the caches still hold the end of grad_w, which was written from the beginning, and
// of what the forward read.
//
// Phase 2 makes row sums, norms and coefficients of the partial sums. It moves almost no bytes.
//
// Phase 3 maps the two-phase chunks in the opposite order, because a cache still holds what was
// read last.
//
// Phase 4 computes the rows that leave the float range again, exactly. Usually there are none.
#include <atomic>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "instruction_set.h"
#include "machine.h"
#include "rows.h"
#include "strips.h"

namespace wnkernel::cpu {
namespace {

// A further thread joins for every kThreadGrain elements. Waking it costs a microsecond, in which a
// core does as many elements, so it saves little at first. But the layer that reads w has its
// threads at work as well, and they should find their part of w in their own caches.
constexpr int64_t kThreadGrain = 8192;
// The cost of a row besides its elements (a root, divisions, a horizontal sum), counted in
// elements.
constexpr int64_t kRowWork = 32;
// The number of rows that share their horizontal sums, with the widest vectors.
constexpr int64_t kRowsAtATime = 16;

int64_t work_of(const RowView& view) { return view.numel() + kRowWork * view.rows; }

template <class P>
class Launch {
 public:
  Launch(const P* problems, int64_t count, const Threads& threads)
      : threads_(threads), many_(count > 1 ? count : 0), count_(count) {
    jobs_ = count > 1 ? many_.data() : &single_;
    const InstructionSet& set = instruction_set();
    int64_t words = 0, twice = 0, bytes = 0;  // bytes counts what the launch reads and writes
    for (int64_t k = 0; k < count; ++k) work_ += work_of(problems[k].view);
    for (int64_t k = 0; k < count; ++k) {
      const P& p = problems[k];
      Job<P>& job = jobs_[k];
      job.p = &p;
      job.plan = make_plan(p.view, chunks_of_rows(p));
      job.set = &set;
      job.k = &kernels(set, p);
      if (is_forced(p)) job.to_v = &set.forward[index_of(p.v_type)][index_of(p.v_type)];
      job.acc = accumulation(p.v_type);
      bytes += p.view.numel() * (bytes_read(p) + bytes_written(p)) + read_again(job);
      twice += read_again(job);
      words += job.plan.workspace();
    }
    for (int64_t k = 0; k < count; ++k) jobs_[k].stream = bytes > cache() && !in_place(problems[k]);
    room_ = twice <= cache() ? twice : std::max(machine().l2, machine().l3 / 8) * parts(work_);
    if (words > 0) share_workspace(words);
  }

  void run() {
    while (next_batch()) run_batch();
  }

 private:
  static constexpr bool kFromTheEnd = Job<P>::kBackward;

  void run_batch() {
    const auto all = [](const Job<P>&) { return true; };
    each_chunk<kFromTheEnd>(all, [](const Job<P>& job, int64_t task) {
      switch (job.plan.kind) {
        case Plan::Kind::rows:
          return whole_rows(job, task);
        case Plan::Kind::runs:
          return runs_sum(job, task);
        case Plan::Kind::strips:
          return job.plan.one_phase ? whole_strip(job, task) : strip_sum(job, task);
      }
    });
    if (twice_ == 0) return;
    std::atomic<int64_t> unsafe{0};
    each_row_block([&](const Job<P>& job, int64_t row, int64_t rows) {
      const bool runs = job.plan.kind == Plan::Kind::runs;
      const int64_t bad = runs ? runs_finish(job, row, rows) : strip_finish(job, row, rows);
      if (bad) unsafe.fetch_add(bad, std::memory_order_relaxed);
    });
    const auto mapped = [](const Job<P>& job) { return !job.plan.one_phase && wants_map(*job.p); };
    each_chunk<!kFromTheEnd>(mapped, [](const Job<P>& job, int64_t task) {
      job.plan.kind == Plan::Kind::runs ? runs_map(job, task) : strip_map(job, task);
    });
    if (unsafe.load() == 0) return;
    each_row_block([](const Job<P>& job, int64_t row, int64_t rows) {
      exact_rows(*job.p, job.sums + row, row, rows);
    });
  }

  // The bytes of a problem that are read a second time.
  static int64_t read_again(const Job<P>& job) {
    return job.plan.one_phase ? 0 : job.plan.view.numel() * bytes_read(*job.p);
  }

  // Moves on to the next batch: the problems from first_ to last_.
  bool next_batch() {
    int64_t& end = kFromTheEnd ? first_ : last_;
    (kFromTheEnd ? last_ : first_) = end;
    batch_work_ = twice_ = 0;
    for (; end != (kFromTheEnd ? 0 : count_); end += kFromTheEnd ? -1 : 1) {
      const Job<P>& job = jobs_[kFromTheEnd ? end - 1 : end];
      const int64_t more = read_again(job);
      if (more > 0 && twice_ > 0 && twice_ + more > room_) break;
      twice_ += more;
      batch_work_ += work_of(job.plan.view);
    }
    return first_ != last_;
  }

  // The bytes that stay in the third level (or the second, if that is larger) until they are read
  // again: three quarters of the threads' share of that cache. Other data need the rest. If a
  // launch reads and writes more, results bypass the caches; this saves reading every line first.
  // Results that replace their inputs need no such reading.
  int64_t cache() const { return std::max(machine().l2, machine().l3) / 4 * 3 * parts(work_); }

  // The number of chunks of a problem of whole rows. The inputs of a chunk take two thirds of the
  // first-level cache, so that the map finds them there, and leave room for its outputs. All
  // threads get the same number of chunks, whose sizes differ by at most one row.
  int64_t chunks_of_rows(const P& p) const {
    const int64_t fit = machine().l1d * 2 / 3 / bytes_read(p) / p.view.row_size();
    const int64_t most = std::clamp<int64_t>(fit, 1, kMaxRows);
    const double part = static_cast<double>(work_of(p.view)) / work_;
    const int64_t threads = std::max(1.0, std::round(part * parts(work_)));
    const int64_t share = ceil_div(p.view.rows, threads);
    const int64_t full = most / kRowsAtATime * kRowsAtATime;
    for (int64_t rows = full; rows > most / 2; rows -= kRowsAtATime)
      if (share % rows == 0) return threads * (share / rows);
    return threads * ceil_div(share, most);
  }

  // The number of threads that share some work.
  int64_t parts(int64_t work) const {
    return std::clamp<int64_t>(work / kThreadGrain, 1, std::max(1, threads_.threads));
  }

  void share_workspace(int64_t words) {
    workspace_.reset(new double[words]);
    double* free = workspace_.get();
    const auto take = [&](int64_t n) { return std::exchange(free, free + n); };
    for (int64_t k = 0; k < count_; ++k) {
      Job<P>& job = jobs_[k];
      if (job.plan.one_phase) continue;
      job.sums = take(job.plan.view.rows);
      job.partials = reinterpret_cast<char*>(take(job.plan.partials()));
      job.a = reinterpret_cast<char*>(take(job.plan.coefficients()));
      job.b = reinterpret_cast<char*>(take(job.plan.coefficients()));
    }
  }

  // Calls body(job, task) for every chunk of every job of the batch that takes part. Thread t takes
  // the chunks that start in its share of the work, so the shares are even and each is contiguous
  // in memory.
  template <bool reversed, class TakesPart, class F>
  void each_chunk(const TakesPart& takes_part, F&& body) {
    int64_t work = 0;
    for (int64_t k = first_; k < last_; ++k)
      if (takes_part(jobs_[k])) work += work_of(jobs_[k].plan.view);
    const int64_t parts = this->parts(batch_work_);
    parallel(parts, [&](int part) {
      const int64_t from = work * part / parts, to = work * (part + 1) / parts;
      int64_t start = reversed ? work : 0;
      for (int64_t j = 0; j < last_ - first_; ++j) {
        const Job<P>& job = jobs_[reversed ? last_ - 1 - j : first_ + j];
        if (!takes_part(job)) continue;
        const int64_t size = work_of(job.plan.view);
        if (reversed) start -= size;
        const int64_t first = first_chunk(job, start, from), last = first_chunk(job, start, to);
        for (int64_t k = first; k < last; ++k) body(job, reversed ? first + last - 1 - k : k);
        if (!reversed) start += size;
      }
    });
  }

  // The first chunk of a job that begins at `limit` or later. The job's own work begins at `start`
  // of all work.
  static int64_t first_chunk(const Job<P>& job, int64_t start, int64_t limit) {
    if (limit <= start) return 0;
    const auto tasks = static_cast<unsigned __int128>(job.plan.tasks);
    const auto size = static_cast<unsigned __int128>(work_of(job.plan.view));
    const auto first = ((limit - start) * tasks + size - 1) / size;
    return first < tasks ? static_cast<int64_t>(first) : job.plan.tasks;
  }

  // Calls body(job, row, rows) for blocks of rows of every two-phase job of the batch.
  template <class F>
  void each_row_block(F&& body) {
    std::vector<std::pair<const Job<P>*, int64_t>> blocks;
    for (int64_t k = first_; k < last_; ++k)
      if (const Job<P>& job = jobs_[k]; !job.plan.one_phase)
        for (int64_t row = 0; row < job.plan.view.rows; row += job.plan.finish_rows())
          blocks.emplace_back(&job, row);
    const int64_t count = static_cast<int64_t>(blocks.size());
    const int64_t parts = std::min<int64_t>(count, std::max(1, threads_.threads));
    parallel(parts, [&](int part) {
      for (int64_t k = count * part / parts; k < count * (part + 1) / parts; ++k) {
        const auto& [job, row] = blocks[k];
        body(*job, row, std::min(job->plan.finish_rows(), job->plan.view.rows - row));
      }
    });
  }

  template <class F>
  void parallel(int64_t parts, const F& body) {
    if (parts == 1) return body(0);
    const auto call = [](void* f, int part) { (*static_cast<const F*>(f))(part); };
    threads_.run(static_cast<int>(parts), call, const_cast<F*>(&body));
  }

  const Threads& threads_;
  Job<P> single_;  // a table with one entry needs no allocation
  std::vector<Job<P>> many_;
  Job<P>* jobs_;
  int64_t count_;
  int64_t work_ = 0;                                          // the work of all problems
  int64_t first_ = kFromTheEnd ? count_ : 0, last_ = first_;  // the problems of the batch
  int64_t batch_work_ = 0;
  int64_t twice_ = 0;  // bytes of the batch that are read twice
  // How many these may be, unless they are of one problem: all of the launch if a cache holds them
  // until the second time; else what fits into the second-level caches of the threads, or into an
  // eighth of their third-level caches, which they share with other cores.
  int64_t room_ = 0;
  std::unique_ptr<double[]> workspace_;
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
