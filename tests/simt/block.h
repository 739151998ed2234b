// Blocks of threads on a CPU, one block at a time: every thread is a fiber, and calls of several
// threads are rendezvous.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

namespace simt {

struct Index {
  unsigned x, y, z;
};
// Of the thread that runs.
extern Index thread_index, block_index;

struct Site {
  const char* file;
  int line;
};
inline Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {file, line};
}

enum class Call : uint8_t { syncthreads, syncthreads_or, any, shfl_xor };
constexpr const char* kNames[] = {"__syncthreads", "__syncthreads_or", "__any_sync",
                                  "__shfl_xor_sync"};

// Waits until all threads of the block, or all lanes of the mask, are at the same call at the same
// place in the source, and returns what the call gives this thread. Dies where they never will be.
uint64_t meet(Call call, Site at, uint64_t value, unsigned mask = 0, unsigned step = 0);

// Shared memory of the running block, the same for each thread: a heap block of its own that begins
// as NaN, so that sanitizers see its bounds and results show what was read before it was written.
void* shared(const char* name, size_t bytes);

// In which order threads run between rendezvous.
enum class Order : int {
  lockstep,    // all threads up to the next rendezvous, in turn
  ascending,   // one warp as far as it can go alone, the first one first
  descending,  // the last lane of the last warp of the last block first
};

struct Launch {
  unsigned blocks, threads;
  void* stream;
  size_t argument_bytes;
};

// What the driver sets and reads.
struct State {
  Order order = Order::lockstep;
  std::vector<Launch> launches;
  int64_t until_failure = -1;  // launches that succeed before one fails; -1: none fails
  int last_error = 0;
  bool ends = false;   // whether only the first and the last block of a launch run
  int processors = 0;  // of the card
  int mutant = 0;      // which of the faults of a library that has some
};
extern State state;

void run(const Launch& launch, const std::function<void()>& body);

template <class Kernel, class... Arguments>
void launch(Kernel kernel, unsigned blocks, unsigned threads, void* stream,
            const Arguments&... arguments) {
  using Copies = std::tuple<std::decay_t<Arguments>...>;
  const auto copies = std::make_unique<const Copies>(arguments...);
  run({blocks, threads, stream, sizeof(Copies)}, [&] { std::apply(kernel, *copies); });
}

}  // namespace simt
