#include "cpu_buffers.h"

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <list>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/machine.h"

namespace wnkernel {
namespace {

// malloc serves smaller requests from its own free lists, without page faults.
constexpr size_t kSmallest = 64 << 10;
// Processors first compare the addresses of loads and stores modulo this. Every buffer has this
// many spare bytes, which no statistic counts, so that a result can start anywhere within them.
constexpr size_t kAlias = 4096;
// A result starts at a multiple of this.
constexpr size_t kLine = 64;
// Idle and used buffers together stay below this many times the recent peak of used buffers.
constexpr int64_t kSlack = 2;
// The recent peak covers the last one or two periods. A period ends when this many times its peak
// was served.
constexpr int64_t kMemory = 8;

// Buffers of this size and more request huge pages, which cause fewer faults at first and fewer TLB
// misses later. malloc does not align its memory for them.
constexpr size_t kHugePage = 2 << 20;

void* allocate_memory(size_t size) {
  const bool huge = size >= kHugePage;
  void* data = nullptr;
  const size_t whole = std::max(kAlias, static_cast<size_t>(cpu::machine().page));
  const int error = posix_memalign(&data, huge ? kHugePage : whole, size);
  TORCH_CHECK(error == 0, "wnkernel: out of memory: cannot allocate ", size,
              " bytes for a result on the CPU");
#if defined(__linux__)
  if (huge) madvise(data, size, MADV_HUGEPAGE);  // advice; nothing depends on the result
#endif
  return data;
}

// The offset modulo kAlias at which results of this thread start; see KeepApart.
thread_local size_t start = 0;

struct Buffer {
  void* data;
  size_t size;
  std::list<Buffer*>::iterator place;  // in Pool::idle_ or Pool::taken_
};

class Pool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kSmallest || !enabled_) return c10::GetCPUAllocator()->allocate(bytes);
    const size_t size = (bytes + kAlias - 1) / kAlias * kAlias;
    Buffer* const buffer = take(size);
    if (!buffer->data) {
      try {
        buffer->data = allocate_memory(size + kAlias);
      } catch (...) {
        forget(buffer);
        throw;
      }
    }
    return {static_cast<char*>(buffer->data) + start, buffer,
            [](void* freed) { pool().give(static_cast<Buffer*>(freed)); },
            c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  BufferStatistics statistics() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {held_, used_};
  }

  void release(bool all) {
    std::vector<Buffer*> freed;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (all) {  // Past peaks must not keep buffers from here on.
        peak_ = last_peak_ = used_;
        served_ = 0;
      }
      while (!idle_.empty() && (all || held_ + used_ > kSlack * std::max(peak_, last_peak_)))
        freed.push_back(evict());
    }
    for (Buffer* buffer : freed) {
      std::free(buffer->data);
      delete buffer;
    }
  }

  // The pool is never destroyed, because tensors may outlive every other static object.
  static Pool& pool() {
    static Pool* const pool = new Pool;
    return *pool;
  }

 private:
  Pool() {
    // A child that is forked while another thread holds the mutex must not inherit it locked.
    pthread_atfork([] { pool().mutex_.lock(); }, [] { pool().mutex_.unlock(); },
                   [] { pool().mutex_.unlock(); });
  }

  // Returns the most recently freed buffer of this size, because a cache may still hold it. If none
  // is idle, returns a new buffer without memory.
  Buffer* take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ += static_cast<int64_t>(size);
    served_ += static_cast<int64_t>(size);
    peak_ = std::max(peak_, used_);
    if (served_ > kMemory * peak_) {
      last_peak_ = std::exchange(peak_, used_);
      served_ = 0;
    }
    auto& same_size = by_size_[size];
    if (same_size.empty()) {
      taken_.push_back(new Buffer{nullptr, size, {}});
      taken_.back()->place = std::prev(taken_.end());
      return taken_.back();
    }
    Buffer* const buffer = same_size.back();
    same_size.pop_back();
    held_ -= static_cast<int64_t>(size);
    taken_.splice(taken_.end(), idle_, buffer->place);
    return buffer;
  }

  void give(Buffer* buffer) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      used_ -= static_cast<int64_t>(buffer->size);
      held_ += static_cast<int64_t>(buffer->size);
      idle_.splice(idle_.end(), taken_, buffer->place);
      by_size_[buffer->size].push_back(buffer);
    }
    release(/*all=*/false);
  }

  // Removes the buffer that is idle longest. It is also the first one of its size.
  Buffer* evict() {
    Buffer* const buffer = idle_.front();
    idle_.pop_front();
    held_ -= static_cast<int64_t>(buffer->size);
    auto& same_size = by_size_[buffer->size];
    same_size.erase(same_size.begin());
    if (same_size.empty()) by_size_.erase(buffer->size);
    return buffer;
  }

  void forget(Buffer* buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= static_cast<int64_t>(buffer->size);
    taken_.erase(buffer->place);
    delete buffer;
  }

  static bool wanted() {
    const char* setting = std::getenv("WNKERNEL_CPU_BUFFERS");
    const std::string wanted = setting ? setting : "";
    if (!wanted.empty() && wanted != "0" && wanted != "1")
      throw std::invalid_argument("WNKERNEL_CPU_BUFFERS: expected 0 or 1, got " + wanted);
    return wanted != "0";
  }

  const bool enabled_ = wanted();
  std::mutex mutex_;
  std::list<Buffer*> idle_;   // longest idle first
  std::list<Buffer*> taken_;  // held by tensors; moving an entry between lists allocates nothing
  std::unordered_map<size_t, std::vector<Buffer*>> by_size_;  // idle, longest idle first
  int64_t held_ = 0, used_ = 0;
  int64_t served_ = 0, peak_ = 0, last_peak_ = 0;  // see kMemory
};

}  // namespace

KeepApart::KeepApart(std::initializer_list<const at::Tensor*> tensors) {
  if (tensors.size() == 0) return;
  const auto place = [](const at::Tensor* t) {
    return reinterpret_cast<uintptr_t>(t->const_data_ptr()) % kAlias;
  };
  const size_t first = place(*tensors.begin()), second = place(*(tensors.end() - 1));
  // There are two ways from the first place to the second around the page. The start is halfway
  // along the longer one.
  const size_t between = (second + kAlias - first) % kAlias;
  const size_t halfway =
      2 * between > kAlias ? first + between / 2 : second + (kAlias - between) / 2;
  start = halfway % kAlias / kLine * kLine;
}

KeepApart::~KeepApart() { start = 0; }

c10::Allocator* cpu_buffers() { return &Pool::pool(); }
BufferStatistics cpu_buffer_statistics() { return Pool::pool().statistics(); }
void release_cpu_buffers() { Pool::pool().release(/*all=*/true); }

}  // namespace wnkernel
