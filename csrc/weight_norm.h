// The problem table that every kernel takes, on any device: plain structs without torch headers.
//
// w = g * v / max(norm, eps), with one norm per row. Kernels see a dense tensor as [outer, rows,
// inner] in memory order. A single weight is a table with one entry; it has no kernel of its own.
#pragma once
#include <cstdint>

namespace wnkernel {

enum class DType : uint8_t { f16, bf16, f32, f64 };

// The type of norms, sums and coefficients, by the type of v.
constexpr DType accumulation(DType v_type) {
  return v_type == DType::f64 ? DType::f64 : DType::f32;
}

// WNKERNEL_PAIRS calls PAIR(name, type of v, type of w) for each pair of types of v and w (or
// grad_w) that kernels are compiled for. Weights of other types are converted before and after a
// launch; see types_of() in ops_device.h.
#define WNKERNEL_PAIRS(PAIR) \
  PAIR(f32, f32, f32)        \
  PAIR(f16, f16, f16)        \
  PAIR(bf16, bf16, bf16)     \
  PAIR(f32_f16, f32, f16)    \
  PAIR(f32_bf16, f32, bf16)  \
  PAIR(f64, f64, f64)

// The CPU has one more pair: with w or grad_w in double, values beyond the range of floats are
// still right.
#define WNKERNEL_CPU_PAIRS(PAIR) WNKERNEL_PAIRS(PAIR) PAIR(f32_f64, f32, f64)

// Whether kernels exist for these types of v and w (or grad_w). Every problem must have such types.
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

// eps is a bound of norms, or, if it is negative, -eps is added to norms: n = max(norm, eps) or n =
// norm - eps (as in EDM2, Karras et al. 2024).
//
// norm is float for f16, bf16 and f32, and double for f64. It knows nothing of eps, and is inf if
// it overflows. w divides by the norm rounded to divisor_type, if the result is a normal number.
// divisor_type is mostly the type of norm, so that a g equal to norm gives w = v; see
// divisor_dtype() in problem.h.
//
// If forced is positive, v is replaced by forced * v / n first. Then w and norm are those of the
// new v, whose norm counts as forced * norm / n; its elements count before they are rounded.
struct Forward {
  const void* v;
  const void* g;  // [rows], contiguous
  void* w;        // laid out like v; v itself, or memory that does not overlap it
  void* norm;     // [rows]
  RowView view;
  DType v_type, g_type, w_type, divisor_type;
  double eps;
  double forced;
};

// With n as above, u = v / n and s = <grad_w, u> per row: grad_v = (g / n) (grad_w - u s n / norm)
// and grad_g = s. Where norm < eps, and in rows of zeros if eps is negative, grad_v = (g / n)
// grad_w.
struct Backward {
  const void* grad_w;  // laid out like v
  const void* v;
  const void* g;
  const void* norm;
  void* grad_v;  // null if it is not wanted
  void* grad_g;  // null if it is not wanted
  RowView view;
  DType v_type, g_type, w_type;  // w_type is the type of grad_w
  double eps;
};

// A launcher reaches the caller's threads through run(tasks, body, context), which calls
// body(context, k) once for every k < tasks, on at most `threads` threads.
struct Threads {
  int threads;
  void (*run)(int tasks, void (*body)(void* context, int task), void* context);
};

// Every problem must have numel > 0. The bits of a result depend neither on the number of threads
// nor on the other problems.
void forward_cpu(const Forward* problems, int64_t count, const Threads& threads);
void backward_cpu(const Backward* problems, int64_t count, const Threads& threads);

// A CUDA launcher reaches the caller's stream and memory through this struct. No launcher waits for
// the device.
struct CudaLaunch {
  void* stream;
  void* context;
  // Returns memory that stays valid until all work that is on the stream at the end of the call has
  // finished.
  void* (*workspace)(void* context, int64_t bytes);
};

// Returns 0 if the module has code for the current device, else a CUDA error.
int cuda_supports_device();

// Both launch on the current device. Every problem must have numel > 0. They return the first CUDA
// error, or 0. The bits of a result depend neither on the other problems nor, within one
// architecture, on the card.
int forward_cuda(const Forward* problems, int64_t count, const CudaLaunch& on);
int backward_cuda(const Backward* problems, int64_t count, const CudaLaunch& on);

// The name of the instruction set that the CPU kernels use on this machine.
const char* cpu_instruction_set();

}  // namespace wnkernel
