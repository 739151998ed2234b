#include "cpu_buffers.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <cstdlib>
#include <list>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace wnkernel {
namespace {

// Smaller requests stay within malloc's own free lists and cost no page faults.
constexpr size_t kSmallest = 64 << 10;
constexpr size_t kPage = 4096;
// Idle buffers are stale once this many times the pool's own size was served without them.
constexpr int64_t kPatience = 8;

// Buffers of this size and more ask for huge pages: fewer faults the first time, fewer TLB misses
// ever after. malloc's memory is not aligned for them.
constexpr size_t kHugePage = 2 << 20;

void* allocate_memory(size_t size) {
#if defined(__linux__)
  if (size >= kHugePage) {
    void* data = nullptr;
    if (posix_memalign(&data, kHugePage, size) == 0) {
      madvise(data, size, MADV_HUGEPAGE);  // advice: nothing depends on the answer
      return data;
    }
  }
#endif
  return c10::alloc_cpu(size);  // throws torch's own out-of-memory error
}

struct Buffer {
  void* data;
  size_t size;
  int64_t served_when_freed = 0;
  std::list<Buffer*>::iterator place;  // in Pool::idle_, while idle
};

class Pool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kSmallest || !enabled_) return c10::GetCPUAllocator()->allocate(bytes);
    const size_t size = (bytes + kPage - 1) / kPage * kPage;
    Buffer* buffer = take(size);
    if (!buffer) {
      buffer = new Buffer{nullptr, size, 0, {}};
      try {
        buffer->data = allocate_memory(size);
      } catch (...) {
        forget(buffer);
        throw;
      }
    }
    return {buffer->data, buffer, [](void* freed) { pool().give(static_cast<Buffer*>(freed)); },
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
      while (!idle_.empty() && (all || is_stale(*idle_.front())))
        freed.push_back(pop(idle_.front()));
    }
    for (Buffer* buffer : freed) {
      c10::free_cpu(buffer->data);
      delete buffer;
    }
  }

  // Never destroyed: tensors may outlive every other static object.
  static Pool& pool() {
    static Pool* const pool = new Pool;
    return *pool;
  }

 private:
  bool is_stale(const Buffer& buffer) const {
    return served_ - buffer.served_when_freed > kPatience * (held_ + used_);
  }

  // The most recently freed buffer of this size: the cache may still hold it.
  Buffer* take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    served_ += static_cast<int64_t>(size);
    used_ += static_cast<int64_t>(size);
    auto& free = by_size_[size];
    return free.empty() ? nullptr : pop(free.back());
  }

  void give(Buffer* buffer) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      used_ -= static_cast<int64_t>(buffer->size);
      held_ += static_cast<int64_t>(buffer->size);
      buffer->served_when_freed = served_;
      buffer->place = idle_.insert(idle_.end(), buffer);
      by_size_[buffer->size].push_back(buffer);
    }
    release(/*all=*/false);
  }

  Buffer* pop(Buffer* buffer) {
    held_ -= static_cast<int64_t>(buffer->size);
    idle_.erase(buffer->place);
    auto& same_size = by_size_[buffer->size];
    same_size.erase(std::find(same_size.begin(), same_size.end(), buffer));
    return buffer;
  }

  void forget(Buffer* buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= static_cast<int64_t>(buffer->size);
    delete buffer;
  }

  static bool wanted() {
    const char* setting = std::getenv("WNKERNEL_CPU_BUFFERS");
    return !setting || std::string(setting) != "0";
  }

  const bool enabled_ = wanted();
  std::mutex mutex_;
  std::list<Buffer*> idle_;                                   // longest idle first
  std::unordered_map<size_t, std::vector<Buffer*>> by_size_;  // idle, longest idle first
  int64_t held_ = 0, used_ = 0, served_ = 0;
};

}  // namespace

c10::Allocator* cpu_buffers() { return &Pool::pool(); }
BufferStatistics cpu_buffer_statistics() { return Pool::pool().statistics(); }
void release_cpu_buffers() { Pool::pool().release(/*all=*/true); }

}  // namespace wnkernel
