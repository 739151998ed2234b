// Memory for results on the CPU: buffers that no tensor holds any more serve the next result of the
// same size.
//
// Fresh memory is what a weight norm on the CPU spends most of its time on: a page fault for every
// 4 KiB of w and grad_v, every step, because malloc gives large blocks back to the system at once.
// A training step frees and asks for the same sizes again, so nearly every request is met here.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

#include <initializer_list>

namespace wnkernel {

// An allocator for at::detail::empty_strided_generic and the like. Thread-safe. A buffer comes back
// when the last tensor, view or array on its storage is gone, never earlier. Idle and used
// buffers together take at most twice what was used at once lately; what is idle longest goes back
// to the system first. The environment variable WNKERNEL_CPU_BUFFERS=0 makes it torch's own
// allocator; the first call throws std::invalid_argument if that is neither 0 nor 1.
c10::Allocator* cpu_buffers();

// While it lives, buffers that this thread asks for start, within a page, as far as possible from
// where these tensors start: a load that follows a store at the same place of another page is taken
// for one of the same memory at first, and has to wait. At most two tensors.
class KeepApart {
 public:
  explicit KeepApart(std::initializer_list<const at::Tensor*> tensors);
  ~KeepApart();
  KeepApart(const KeepApart&) = delete;
  KeepApart& operator=(const KeepApart&) = delete;
};

struct BufferStatistics {
  int64_t held_bytes;  // idle, waiting for the next request
  int64_t used_bytes;  // held by tensors
};
BufferStatistics cpu_buffer_statistics();

// Give all idle buffers back to the system.
void release_cpu_buffers();

}  // namespace wnkernel
