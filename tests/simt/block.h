// Runs blocks of threads on a CPU, one block at a time. Every thread is a fiber, and a call of
// several threads is a rendezvous.
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
// The indices of the running thread.
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

// Waits until all threads of the block, or all lanes of the mask, make the same call at the same
// place in the source, and returns the result for this thread. Ends the program if they never will.
uint64_t meet(Call call, Site at, uint64_t value, unsigned mask = 0, unsigned step = 0);

// Shared memory of the running block, the same for each of its threads. It is a heap block of its
// own that is filled with NaN, so that sanitizers see its bounds and results show reads before
// writes.
void* shared(const char* name, size_t bytes);

// The order in which threads run between rendezvous.
enum class Order : int {
  lockstep,    // all threads in turn, each up to the next rendezvous
  ascending,   // warps in turn from the first, each as far as it can go alone
  descending,  // starts with the last lane of the last warp of the last block
};

struct Launch {
  unsigned blocks, threads;
  void* stream;
  size_t argument_bytes;
};

// The driver sets and reads this state.
struct State {
  Order order = Order::lockstep;
  std::vector<Launch> launches;
  int64_t until_failure = -1;  // launches before the first failure; -1: none fails
  int last_error = 0;
  bool ends = false;   // whether only the first and the last block of a launch run
  int processors = 0;  // processors of the card
  int mutant = 0;      // which fault is switched on, in a library that has faults
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
