#include "block.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "fiber.h"

namespace simt {

Index thread_index, block_index;
State state;

namespace {

constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr size_t kMostArgumentBytes = 32764;
constexpr int kInvalidConfiguration = 9, kLaunchFailure = 719;  // cudaError_t

struct Thread {
  enum class Is : uint8_t { ready, waiting, returned };

  std::unique_ptr<char[]> stack{new char[Fiber::kStackBytes]};
  Fiber fiber{stack.get(), [] { live(); }};
  Is is = Is::returned;
  // The call at which the thread waits.
  Call call;
  Site at;
  unsigned mask, step;
  uint64_t value;  // what the thread gives to the call, then what it gets

  [[noreturn]] static void live();

  bool of_warp() const { return is == Is::waiting && mask != 0; }
  bool meets(const Thread& o) const {
    return is == o.is && call == o.call && mask == o.mask && step == o.step &&
           at.line == o.at.line && std::strcmp(at.file, o.at.file) == 0;
  }
  std::string where() const {
    if (is == Is::returned) return "returned";
    if (is == Is::ready) return "running";
    char text[256];
    const char* slash = std::strrchr(at.file, '/');
    std::snprintf(text, sizeof text, "%s, mask %x, step %u, at %s:%d", kNames[int(call)], mask,
                  step, slash ? slash + 1 : at.file, at.line);
    return text;
  }
};

std::vector<std::unique_ptr<Thread>> threads;  // later blocks reuse the stacks
unsigned count, current;                       // threads of a block; the running thread
const std::function<void()>* body;
std::map<std::string, std::unique_ptr<char[]>> shared_memory;

[[noreturn]] void die(const char* why) {
  std::fprintf(stderr, "simt: %s\nblock %u, thread %u\n", why, block_index.x, thread_index.x);
  std::map<std::string, std::pair<unsigned, unsigned>> places;  // first thread, number of threads
  for (unsigned k = 0; k < count; ++k)
    ++places.try_emplace(threads[k]->where(), k, 0).first->second.second;
  for (const auto& [where, who] : places)
    std::fprintf(stderr, "%u threads from %u on: %s\n", who.second, who.first, where.c_str());
  std::abort();
}

void Thread::live() {
  for (;;) {
    (*body)();
    threads[current]->is = Is::returned;
    threads[current]->fiber.leave();
  }
}

// Lets a thread run until it waits or returns.
void step_thread(unsigned k) {
  current = thread_index.x = k;
  threads[k]->fiber.enter();
}

// Ends the calls of a warp that all their lanes have reached.
bool meet_warp(unsigned first) {
  bool any_met = false;
  for (unsigned k = first; k < std::min(first + kWarp, count); ++k) {
    if (!threads[k]->of_warp()) continue;
    const unsigned mask = threads[k]->mask;
    std::vector<Thread*> lanes(kWarp, nullptr);
    bool all = true;
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1) {
        lanes[lane] = threads[first + lane].get();
        all &= lanes[lane]->meets(*threads[k]);
      }
    if (!all) continue;
    uint64_t before[kWarp] = {}, any = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (lanes[lane]) any |= before[lane] = lanes[lane]->value;
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (lanes[lane]) {
        lanes[lane]->value =
            lanes[lane]->call == Call::any ? any : before[lane ^ lanes[lane]->step];
        lanes[lane]->is = Thread::Is::ready;
      }
    any_met = true;
  }
  return any_met;
}

// Ends the call that all threads of the block have reached.
void meet_block() {
  uint64_t any = 0;
  for (unsigned k = 0; k < count; ++k) {
    if (threads[k]->is != Thread::Is::waiting || threads[k]->of_warp() ||
        !threads[k]->meets(*threads[0]))
      die("threads wait for others that do not come");
    any |= threads[k]->value;
  }
  for (unsigned k = 0; k < count; ++k) {
    threads[k]->value = any;
    threads[k]->is = Thread::Is::ready;
  }
}

void run_block() {
  const bool down = state.order == Order::descending;
  for (unsigned k = 0; k < count; ++k) threads[k]->is = Thread::Is::ready;
  const unsigned warps = (count + kWarp - 1) / kWarp;
  for (;;) {
    bool met = false;
    for (unsigned w = 0; w < warps; ++w) {
      const unsigned first = (down ? warps - 1 - w : w) * kWarp,
                     size = std::min(kWarp, count - first);
      bool again = true;
      while (again) {
        for (unsigned k = 0; k < size; ++k) {
          const unsigned thread = first + (down ? size - 1 - k : k);
          if (threads[thread]->is == Thread::Is::ready) step_thread(thread);
        }
        const bool warp_met = meet_warp(first);
        met |= warp_met;
        again = warp_met && state.order != Order::lockstep;
      }
    }
    if (met) continue;
    const auto returned = [](const auto& t) { return t->is == Thread::Is::returned; };
    if (std::all_of(threads.begin(), threads.begin() + count, returned)) break;
    meet_block();
  }
  shared_memory.clear();
}

}  // namespace

uint64_t meet(Call call, Site at, uint64_t value, unsigned mask, unsigned step) {
  Thread& t = *threads[current];
  const bool of_warp = call == Call::any || call == Call::shfl_xor;
  if (of_warp) {
    const unsigned lane = current % kWarp, left = count - current / kWarp * kWarp;
    if (!(mask >> lane & 1)) die("a lane is not in its own mask");
    if (left < kWarp && mask >> left) die("a mask names lanes that the block does not have");
    if (!(mask >> ((lane ^ step) % kWarp) & 1) || step >= kWarp)
      die("a lane asks one not in its mask");
  }
  t.call = call;
  t.at = at;
  t.value = value;
  t.mask = mask;
  t.step = step;
  t.is = Thread::Is::waiting;
  t.fiber.leave();
  return t.value;
}

void* shared(const char* name, size_t bytes) {
  auto& memory = shared_memory[name];
  if (!memory) {
    memory.reset(new char[bytes]);
    std::memset(memory.get(), 0xff, bytes);
  }
  return memory.get();
}

void run(const Launch& launch, const std::function<void()>& kernel) {
  state.launches.push_back(launch);
  if (state.until_failure >= 0 && state.until_failure-- == 0) {
    state.last_error = kLaunchFailure;
    return;
  }
  if (launch.blocks - 1 > 0x7ffffffe || launch.threads - 1 >= kMostThreads ||
      launch.argument_bytes > kMostArgumentBytes) {
    state.last_error = kInvalidConfiguration;
    return;
  }
  count = launch.threads;
  body = &kernel;
  while (threads.size() < count) threads.push_back(std::make_unique<Thread>());
  const unsigned step = state.ends ? std::max(1u, launch.blocks - 1) : 1;
  for (unsigned b = 0; b < launch.blocks; b += step) {
    block_index.x = state.order == Order::descending ? launch.blocks - 1 - b : b;
    run_block();
  }
}

}  // namespace simt
