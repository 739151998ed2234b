// Memory for results on the CPU. A buffer that no tensor holds any more serves the next result of
// the same size.
//
// A weight norm on the CPU would spend most of its time on fresh memory: every step takes a page
// fault for every 4 KiB of w and grad_v, because malloc returns large blocks to the system at once.
// A training step frees and requests the same sizes again, so the buffers meet nearly every
// request.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

#include <initializer_list>

namespace wnkernel {

// An allocator for at::detail::empty_strided_generic and similar functions. It is thread-safe. A
// buffer comes back when the last tensor, view or array on its storage is gone, never earlier. Idle
// and used buffers together take at most twice the recent peak of used buffers; the longest idle
// buffer returns to the system first. The environment variable WNKERNEL_CPU_BUFFERS=0 makes this
// torch's own allocator. The first call throws std::invalid_argument if the variable is neither 0
// nor 1.
c10::Allocator* cpu_buffers();

// While a KeepApart lives, buffers of this thread start as far as possible, within a page, from
// where the given tensors start. Otherwise a load that follows a store at the same offset of
// another page would wait, because the processor first takes both for the same memory. It accepts
// at most two tensors.
class KeepApart {
 public:
  explicit KeepApart(std::initializer_list<const at::Tensor*> tensors);
  ~KeepApart();
  KeepApart(const KeepApart&) = delete;
  KeepApart& operator=(const KeepApart&) = delete;
};

struct BufferStatistics {
  int64_t held_bytes;  // bytes that wait idle for the next request
  int64_t used_bytes;  // bytes that tensors hold
};
BufferStatistics cpu_buffer_statistics();

// Returns all idle buffers to the system.
void release_cpu_buffers();

}  // namespace wnkernel
