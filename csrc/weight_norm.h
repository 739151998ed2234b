// The problem table: what every kernel takes, whatever its device. Plain structs, no torch headers.
//
// w = g * v / max(norm, eps), one norm per row of a dense tensor seen as [outer, rows, inner] in
// memory order. A single weight is a table of one; there is no other kernel.
#pragma once
#include <cstdint>

namespace wnkernel {

enum class DType : uint8_t { f16, bf16, f32, f64 };

// The type of norms, sums and coefficients for v of a type.
constexpr DType accumulation(DType v_type) {
  return v_type == DType::f64 ? DType::f64 : DType::f32;
}

// The pairs of types of v and w (or grad_w) that kernels are compiled for: calls PAIR(name, type of
// v, type of w) for each of them. Weights of other types are converted before and after a launch,
// see types_of() in ops_device.h.
#define WNKERNEL_PAIRS(PAIR) \
  PAIR(f32, f32, f32)        \
  PAIR(f16, f16, f16)        \
  PAIR(bf16, bf16, bf16)     \
  PAIR(f32_f16, f32, f16)    \
  PAIR(f32_bf16, f32, bf16)  \
  PAIR(f64, f64, f64)

// One more on the CPU, where a w or its gradient in double may be beyond the range of floats and is
// still right.
#define WNKERNEL_CPU_PAIRS(PAIR) WNKERNEL_PAIRS(PAIR) PAIR(f32_f64, f32, f64)

// Whether there are kernels for v and w (or grad_w) of these types; problems have to be of such.
#define WNKERNEL_IS_PAIR(name, v, w) || (v_type == DType::v && w_type == DType::w)
constexpr bool cuda_takes(DType v_type, DType w_type) {
  return false WNKERNEL_PAIRS(WNKERNEL_IS_PAIR);
}
constexpr bool cpu_takes(DType v_type, DType w_type) {
  return false WNKERNEL_CPU_PAIRS(WNKERNEL_IS_PAIR);
}
#undef WNKERNEL_IS_PAIR

struct RowView {
  int64_t outer, rows, inner;
  int64_t row_size() const { return outer * inner; }
  int64_t numel() const { return outer * rows * inner; }
};

// norm is float for f16, bf16 and f32, double for f64; unclamped by eps, inf where it does not fit.
// What divides is the norm rounded to divisor_type, where that is a normal number: mostly the type
// of norm, so that a g equal to norm gives w = v; see divisor_dtype() in problem.h.
struct Forward {
  const void* v;
  const void* g;  // [rows], contiguous
  void* w;        // laid out like v
  void* norm;     // [rows]
  RowView view;
  DType v_type, g_type, w_type, divisor_type;
  double eps;
};

// With n = max(norm, eps), u = v / n, s = <grad_w, u> per row:
// grad_v = (g / n) (grad_w - u s), grad_g = s; without the projection where norm < eps.
struct Backward {
  const void* grad_w;  // laid out like v
  const void* v;
  const void* g;
  const void* norm;
  void* grad_v;  // null: not wanted
  void* grad_g;  // null: not wanted
  RowView view;
  DType v_type, g_type, w_type;  // w_type: of grad_w
  double eps;
};

// How a launcher reaches the caller's threads: run(tasks, body, context) calls body(context, k)
// once for every k < tasks, on at most `threads` threads.
struct Threads {
  int threads;
  void (*run)(int tasks, void (*body)(void* context, int task), void* context);
};

// Every problem must have numel > 0. Same bits for any number of threads and any neighbours.
void forward_cpu(const Forward* problems, int64_t count, const Threads& threads);
void backward_cpu(const Backward* problems, int64_t count, const Threads& threads);

// How a CUDA launcher reaches the caller's stream and memory. Nothing waits for the device.
struct CudaLaunch {
  void* stream;
  void* context;
  // Memory that stays until what is on the stream by the end of the call is done.
  void* (*workspace)(void* context, int64_t bytes);
};

// 0 if there is code for the current device, else a CUDA error.
int cuda_supports_device();

// On the current device. Every problem must have numel > 0. Returns the first CUDA error, or 0.
// Same bits for any neighbours and any card of one architecture.
int forward_cuda(const Forward* problems, int64_t count, const CudaLaunch& on);
int backward_cuda(const Backward* problems, int64_t count, const CudaLaunch& on);

// Name of the instruction set that the CPU kernels use on this machine.
const char* cpu_instruction_set();

}  // namespace wnkernel
