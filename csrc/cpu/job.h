// A Job is one problem of a launch with its plan, its kernels and its share of the workspace. The
// functions above it hide the differences between forward and backward; primitives.h explains x, y
// and out.
#pragma once
#include <type_traits>

#include "elements.h"
#include "exact_rows.h"
#include "plan.h"
#include "primitives.h"

namespace wnkernel::cpu {

inline int index_of(DType t) { return static_cast<int>(t); }

inline const char* at(const void* p, int64_t k, DType t) {
  return static_cast<const char*>(p) + k * element_size(t);
}
inline char* at(void* p, int64_t k, DType t) { return static_cast<char*>(p) + k * element_size(t); }

inline const Kernels& kernels(const InstructionSet& set, const Forward& p) {
  return set.forward[index_of(p.v_type)][index_of(p.w_type)];
}
inline const Kernels& kernels(const InstructionSet& set, const Backward& p) {
  return set.backward[index_of(p.v_type)][index_of(p.w_type)];
}
inline const char* x_at(const Forward& p, int64_t k) { return at(p.v, k, p.v_type); }
inline const char* x_at(const Backward& p, int64_t k) { return at(p.grad_w, k, p.w_type); }
inline char* out_at(const Forward& p, int64_t k) { return at(p.w, k, p.w_type); }
inline char* out_at(const Backward& p, int64_t k) { return at(p.grad_v, k, p.v_type); }
// Whether w takes the place of v.
inline bool in_place(const Forward& p) { return p.w == p.v; }
inline bool in_place(const Backward&) { return false; }
inline bool is_forced(const Forward& p) { return p.forced > 0; }
inline bool is_forced(const Backward&) { return false; }
// Bytes per element.
inline int64_t bytes_read(const Forward& p) { return element_size(p.v_type); }
inline int64_t bytes_read(const Backward& p) {
  return element_size(p.v_type) + element_size(p.w_type);
}
inline int64_t bytes_written(const Forward& p) {
  return element_size(p.w_type) + (is_forced(p) ? element_size(p.v_type) : 0);
}
inline int64_t bytes_written(const Backward& p) { return p.grad_v ? element_size(p.v_type) : 0; }
inline bool wants_map(const Forward&) { return true; }
inline bool wants_map(const Backward& p) { return p.grad_v != nullptr; }

template <class P>
const Finish& finish_of(const InstructionSet& set, const P& p) {
  return set.finish[accumulation(p.v_type) == DType::f64][index_of(p.g_type)];
}

inline int64_t finish(const InstructionSet& set, const Forward& p, int64_t row, int64_t rows,
                      double* sums, void* a, void* b) {
  return finish_of(set, p).forward(sums, at(p.g, row, p.g_type), rows, p.eps,
                                   p.divisor_type != accumulation(p.v_type), p.forced,
                                   at(p.norm, row, accumulation(p.v_type)), a, b);
}
inline int64_t finish(const InstructionSet& set, const Backward& p, int64_t row, int64_t rows,
                      double* sums, void* a, void* b) {
  return finish_of(set, p).backward(sums, at(p.g, row, p.g_type),
                                    at(p.norm, row, accumulation(p.v_type)), rows, p.eps,
                                    p.grad_g ? at(p.grad_g, row, p.g_type) : nullptr, a, b);
}

// Computes the rows that finish() has marked again.
template <class P>
void exact_rows(const P& p, const double* sums, int64_t row, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    if (sums[r] != sums[r]) exact_row(p, row + r);
}

template <class P>
struct Job {
  static constexpr bool kBackward = std::is_same_v<P, Backward>;

  const P* p = nullptr;
  Plan plan{};
  const InstructionSet* set = nullptr;
  const Kernels* k = nullptr;
  const Kernels* to_v = nullptr;  // what maps v to the new v, if v is forced
  DType acc{};
  bool stream = false;
  // The workspace of a two-phase plan; its sizes are in the plan.
  double* sums = nullptr;  // one per row
  char* partials = nullptr;
  char* a = nullptr;
  char* b = nullptr;

  // x, y and out, starting at element k of the problem.
  const char* x(int64_t k) const { return x_at(*p, k); }
  const char* y(int64_t k) const { return at(p->v, k, p->v_type); }
  char* out(int64_t k) const { return out_at(*p, k); }

  // Whether rows have two coefficients: those of a backward, or those of w and of the new v.
  bool has_b() const { return kBackward || to_v; }

  // Both map from element k on, as primitives.h says. The new v comes last, because w is computed
  // from the old one.
  void map_rows(int64_t k, int64_t rows, int64_t n, const void* a, const void* b) const {
    this->k->map_rows(x(k), y(k), out(k), rows, n, a, b, stream);
    if (to_v) to_v->map_rows(y(k), y(k), new_v(k), rows, n, b, b, false);
  }
  void map_columns(int64_t k, int64_t outer, int64_t stride, int64_t columns, const void* a,
                   const void* b) const {
    this->k->map_columns(x(k), y(k), out(k), outer, stride, columns, a, b, stream);
    if (to_v) to_v->map_columns(y(k), y(k), new_v(k), outer, stride, columns, b, b, false);
  }

 private:
  char* new_v(int64_t k) const { return at(const_cast<void*>(p->v), k, p->v_type); }
};

}  // namespace wnkernel::cpu
