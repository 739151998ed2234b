#include "fiber.h"

#include <sanitizer/common_interface_defs.h>

#include <cstdint>

namespace simt {
namespace {

// The place where enter() was called. There is only one, because fibers do not enter others.
struct Outside {
  const void* stack = nullptr;
  size_t bytes = 0;
  void* shadow = nullptr;
#if defined(__x86_64__)
  void* place = nullptr;
#else
  ucontext_t place;
#endif
} outside;

Fiber* entered = nullptr;

}  // namespace

// ucontext's switches are system calls, which take a hundred times as long as this function.
#if defined(__x86_64__)
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

Fiber::Fiber(char* stack, void (*body)()) : stack_(stack), body_(body) {
  // The stack looks as simt_switch leaves one: six registers, where to continue, and no caller.
  auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~15);
  for (int k = 1; k <= 8; ++k) top[-k] = nullptr;
  top[-2] = reinterpret_cast<void*>(&Fiber::first);
  place_ = top - 8;
}
#else
void simt_switch(ucontext_t* from, ucontext_t& to) { swapcontext(from, &to); }

Fiber::Fiber(char* stack, void (*body)()) : stack_(stack), body_(body) {
  getcontext(&place_);
  place_.uc_stack.ss_sp = stack;
  place_.uc_stack.ss_size = kStackBytes;
  place_.uc_link = nullptr;
  makecontext(&place_, &Fiber::first, 0);
}
#endif

void Fiber::first() {
  __sanitizer_finish_switch_fiber(nullptr, &outside.stack, &outside.bytes);
  entered->body_();
}

void Fiber::enter() {
  entered = this;
  __sanitizer_start_switch_fiber(&outside.shadow, stack_, kStackBytes);
  simt_switch(&outside.place, place_);
  __sanitizer_finish_switch_fiber(outside.shadow, nullptr, nullptr);
}

void Fiber::leave() {
  __sanitizer_start_switch_fiber(&shadow_, outside.stack, outside.bytes);
  simt_switch(&place_, outside.place);
  __sanitizer_finish_switch_fiber(shadow_, &outside.stack, &outside.bytes);
}

}  // namespace simt
