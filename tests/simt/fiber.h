// A thread of a block, with its own stack and a place where it waits. Switches are reported to
// AddressSanitizer, which keeps a shadow of every stack.
#pragma once
#include <cstddef>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
 public:
  // body never returns. stack has kStackBytes bytes, which outlive the fiber.
  Fiber(char* stack, void (*body)());
  Fiber(const Fiber&) = delete;

  // Runs this fiber until it calls leave(). The caller must be outside of all fibers.
  void enter();
  // Returns to where enter() was called. The caller must be within this fiber.
  void leave();

  static constexpr size_t kStackBytes = size_t{64} << 10;

 private:
  static void first();

  char* stack_;
  void (*body_)();
  void* shadow_ = nullptr;
#if defined(__x86_64__)
  void* place_;
#else
  ucontext_t place_;
#endif
};

}  // namespace simt
