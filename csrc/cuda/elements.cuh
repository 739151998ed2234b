// Elements of arrays: their vectors in memory, and their values in the type of sums.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../weight_norm.h"
#include "device.h"

namespace wnkernel::cuda {

// T is the type of elements; Sum is the type of sums, norms and coefficients.
template <class T>
struct Element {
  using Sum = float;
};
template <>
struct Element<double> {
  using Sum = double;
};

template <class T>
constexpr DType kType = DType::f32;
template <>
constexpr DType kType<double> = DType::f64;
template <>
constexpr DType kType<__half> = DType::f16;
template <>
constexpr DType kType<__nv_bfloat16> = DType::bf16;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest, ties to even. float64 becomes a half type by way of float32.
template <class T>
__device__ inline T narrow(double x) {
  return static_cast<T>(x);
}
template <>
__device__ inline __half narrow(double x) {
  return __float2half_rn(static_cast<float>(x));
}
template <>
__device__ inline __nv_bfloat16 narrow(double x) {
  return __float2bfloat16_rn(static_cast<float>(x));
}

// N neighbouring elements, which one access of up to 16 bytes moves.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N <= 16);
  T x[N];
};

template <int Bytes>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Loads from an array to which no thread of the launch writes, so a load may overtake a store.
// There is one exception: where w is v, or v is replaced, each thread writes only the elements that
// it has loaded for the last time, and needs nothing that another thread writes.
template <int N, class T>
__device__ inline Vector<T, N> load(const T* p) {
  const auto word = __ldg(reinterpret_cast<const typename Word<sizeof(T) * N>::type*>(p));
  Vector<T, N> v;
  memcpy(&v, &word, sizeof(word));
  return v;
}

template <class T, int N>
__device__ inline void store(T* p, const Vector<T, N>& v) {
  typename Word<sizeof(T) * N>::type word;
  memcpy(&word, &v, sizeof(word));
  *reinterpret_cast<typename Word<sizeof(T) * N>::type*>(p) = word;
}

// Marks the stored lines as the first to leave a cache, which keeps what will be read a second
// time.
template <class T, int N>
__device__ inline void store_past_cache(T* p, const Vector<T, N>& v) {
  typename Word<sizeof(T) * N>::type word;
  memcpy(&word, &v, sizeof(word));
  __stcs(reinterpret_cast<typename Word<sizeof(T) * N>::type*>(p), word);
}

template <class T, int N>
__device__ inline Vector<T, N> zeros() {
  Vector<T, N> v;
  memset(&v, 0, sizeof(v));
  return v;
}

// Makes the compiler widen these halves again from here on. Otherwise it would keep both forms, in
// four times the registers.
template <class T, int N>
__device__ inline void forget_widened(Vector<T, N>& v) {
  if constexpr (sizeof(T) == 2 && N > 1) {
    uint32_t words[sizeof(v) / sizeof(uint32_t)];
    memcpy(words, &v, sizeof(v));
#pragma unroll
    for (uint32_t& word : words) asm("" : "+r"(word));
    memcpy(&v, words, sizeof(v));
  }
}

// Element k of an array whose type is known only at run time, as raw bits. It is loaded early,
// while other loads are in flight, and decoded later. Only a float64 that becomes a float32 is
// awaited and rounded at once. No thread of the launch writes to the array.
template <class Sum>
using Held = std::conditional_t<sizeof(Sum) == 8, uint64_t, uint32_t>;

template <class Sum>
__device__ inline Held<Sum> load_held(const void* p, DType type, int64_t k) {
  switch (type) {
    case DType::f16:
    case DType::bf16:
      return __ldg(static_cast<const uint16_t*>(p) + k);
    case DType::f32:
      return __ldg(static_cast<const uint32_t*>(p) + k);
    default:
      const Sum x = static_cast<Sum>(__ldg(static_cast<const double*>(p) + k));
      Held<Sum> held;
      memcpy(&held, &x, sizeof(x));
      return held;
  }
}

template <class T, class Bits>
__device__ inline T bits_as(Bits held) {
  T x;
  memcpy(&x, &held, sizeof(x));  // the first bytes are the lowest
  return x;
}

template <class Sum>
__device__ inline Sum value_of(Held<Sum> held, DType type) {
  switch (type) {
    case DType::f16:
      return static_cast<Sum>(widen(bits_as<__half>(held)));
    case DType::bf16:
      return static_cast<Sum>(widen(bits_as<__nv_bfloat16>(held)));
    case DType::f32:
      return static_cast<Sum>(bits_as<float>(held));
    default:
      return bits_as<Sum>(held);
  }
}

template <class Sum>
__device__ inline void store_as(void* p, DType type, int64_t k, Sum x) {
  switch (type) {
    case DType::f16:
      static_cast<__half*>(p)[k] = narrow<__half>(x);
      break;
    case DType::bf16:
      static_cast<__nv_bfloat16*>(p)[k] = narrow<__nv_bfloat16>(x);
      break;
    case DType::f32:
      static_cast<float*>(p)[k] = static_cast<float>(x);
      break;
    default:
      static_cast<double*>(p)[k] = static_cast<double>(x);
  }
}

}  // namespace wnkernel::cuda
