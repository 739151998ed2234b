// Vectors of the instruction set that this translation unit is compiled for: WNKERNEL_ISA names its
// namespace, WNKERNEL_VECTOR_BYTES its width. Loads widen to the accumulation type, stores round.
#pragma once
#include "elements.h"

namespace wnkernel::cpu::WNKERNEL_ISA {

#define WNKERNEL_INLINE static inline __attribute__((always_inline))

template <class T, int bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};
template <class A>
using Vec = typename VectorOf<A, WNKERNEL_VECTOR_BYTES>::type;
template <class A>
constexpr int64_t kLanes = WNKERNEL_VECTOR_BYTES / sizeof(A);

// A vector of T with as many lanes as Vec<A>.
template <class T, class A>
using Narrow = typename VectorOf<T, kLanes<A> * sizeof(T)>::type;

template <class To, class From>
WNKERNEL_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class R>
WNKERNEL_INLINE R load_raw(const void* p) {
  R raw;
  __builtin_memcpy(&raw, p, sizeof raw);
  return raw;
}

template <class A, class T>
struct Convert {  // float <-> double, and the pairs nobody uses (double sums of half grads)
  WNKERNEL_INLINE Vec<A> load(const T* p) {
    if constexpr (sizeof(T) >= 4) {
      return __builtin_convertvector((load_raw<Narrow<T, A>>(p)), Vec<A>);
    } else {
      Vec<A> out;
      for (int k = 0; k < kLanes<A>; ++k) out[k] = to_float(p[k]);
      return out;
    }
  }
  WNKERNEL_INLINE void store(T* p, Vec<A> x) {
    if constexpr (sizeof(T) >= 4) {
      const auto narrow = __builtin_convertvector(x, Narrow<T, A>);
      __builtin_memcpy(p, &narrow, sizeof narrow);
    } else {
      for (int k = 0; k < kLanes<A>; ++k) from_double(x[k], p + k);
    }
  }
};

template <class A>
struct Convert<A, A> {
  WNKERNEL_INLINE Vec<A> load(const A* p) { return load_raw<Vec<A>>(p); }
  WNKERNEL_INLINE void store(A* p, Vec<A> x) { __builtin_memcpy(p, &x, sizeof x); }
};

template <>
struct Convert<float, bf16> {
  using U32 = Vec<uint32_t>;
  using U16 = Narrow<uint16_t, float>;
  WNKERNEL_INLINE Vec<float> load(const bf16* p) {
    return bit_cast<Vec<float>>(__builtin_convertvector(load_raw<U16>(p), U32) << 16);
  }
  WNKERNEL_INLINE void store(bf16* p, Vec<float> x) {
    const U32 bits = bit_cast<U32>(x);
    const U32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const U32 quiet = bits * 0 + 0x7fc0u;
    const U16 out = __builtin_convertvector(x == x ? rounded : quiet, U16);
    __builtin_memcpy(p, &out, sizeof out);
  }
};

#if defined(WNKERNEL_HALF_LOAD)  // the instruction set converts half vectors itself
template <>
struct Convert<float, f16> {
  WNKERNEL_INLINE Vec<float> load(const f16* p) { return bit_cast<Vec<float>>(WNKERNEL_HALF_LOAD(p)); }
  WNKERNEL_INLINE void store(f16* p, Vec<float> x) { WNKERNEL_HALF_STORE(p, x); }
};
#endif

template <class A, class T>
WNKERNEL_INLINE Vec<A> load(const T* p) {
  return Convert<A, T>::load(p);
}

template <class A, class T>
WNKERNEL_INLINE void store(T* p, Vec<A> x) {
  Convert<A, T>::store(p, x);
}

// The first n < kLanes<A> elements; the other lanes are zero.
template <class A, class T>
WNKERNEL_INLINE Vec<A> load_partial(const T* p, int64_t n) {
  T padded[kLanes<A>] = {};
  for (int64_t k = 0; k < n; ++k) padded[k] = p[k];
  return load<A>(padded);
}

template <class A, class T>
WNKERNEL_INLINE void store_partial(T* p, Vec<A> x, int64_t n) {
  T padded[kLanes<A>];
  store<A>(padded, x);
  for (int64_t k = 0; k < n; ++k) p[k] = padded[k];
}

// Halves are folded onto each other: a fixed order, log2(lanes) additions.
template <class A>
WNKERNEL_INLINE A horizontal_sum(Vec<A> x) {
  A lanes[kLanes<A>];
  __builtin_memcpy(lanes, &x, sizeof x);
  for (int64_t width = kLanes<A> / 2; width > 0; width /= 2)
    for (int64_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  return lanes[0];
}

}  // namespace wnkernel::cpu::WNKERNEL_ISA
