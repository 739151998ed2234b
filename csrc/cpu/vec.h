// Vectors of the instruction set that this translation unit is compiled for. WNKERNEL_ISA is its
// namespace, WNKERNEL_VECTOR_BYTES the size of its vectors. Loads widen to the accumulation type,
// stores round.
//
// An instruction set may define these macros before it includes this file, where the compiler's
// portable vectors do not suffice: WNKERNEL_WIDEN_HALF and WNKERNEL_NARROW_HALF convert halves.
// WNKERNEL_WIDEN_U16 and WNKERNEL_NARROW_U32 convert 16-bit integers (U16) to 32 bits (U32) and
// back. WNKERNEL_ROUND_UPPER rounds the upper halves of a U32. WNKERNEL_MASKED_LOAD loads n
// elements of 4 or 8 bytes. WNKERNEL_MASKED_MOVES moves every partial vector in one instruction.
// WNKERNEL_ROUND_PRODUCT rounds the products at the end of a row before they are added, as gcc has
// always done, instead of fusing them with the sum. WNKERNEL_STREAM stores past the caches.
#pragma once
#include <type_traits>
#include <utility>

#include "elements.h"

namespace wnkernel::cpu::WNKERNEL_ISA {

#define WNKERNEL_INLINE static inline __attribute__((always_inline))

template <class T, int64_t bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};
template <class A>
using Vec = typename VectorOf<A, WNKERNEL_VECTOR_BYTES>::type;
template <class A>
constexpr int64_t kLanes = WNKERNEL_VECTOR_BYTES / sizeof(A);

// As many elements of T in storage as Vec<A> has lanes.
template <class T>
struct StorageOf {
  using type = T;
};
template <>
struct StorageOf<f16> {
  using type = uint16_t;
};
template <>
struct StorageOf<bf16> {
  using type = uint16_t;
};
template <class T, class A>
using Raw = typename VectorOf<typename StorageOf<T>::type, kLanes<A> * int64_t{sizeof(T)}>::type;

template <class To, class From>
WNKERNEL_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Converts Raw to Vec<A> and back, by element type.
template <class A, class T>
struct Convert {  // float and double
  WNKERNEL_INLINE Vec<A> widen(Raw<T, A> raw) { return __builtin_convertvector(raw, Vec<A>); }
  WNKERNEL_INLINE Raw<T, A> narrow(Vec<A> x) { return __builtin_convertvector(x, Raw<T, A>); }
};

template <class A>
struct Convert<A, A> {
  WNKERNEL_INLINE Vec<A> widen(Vec<A> raw) { return raw; }
  WNKERNEL_INLINE Vec<A> narrow(Vec<A> x) { return x; }
};

#if !defined(WNKERNEL_WIDEN_U16)
#define WNKERNEL_WIDEN_U16(raw) __builtin_convertvector(raw, Vec<uint32_t>)
#define WNKERNEL_NARROW_U32(x) __builtin_convertvector(x, U16)
#endif
// Rounds the upper halves of 32-bit integers to nearest even.
#if !defined(WNKERNEL_ROUND_UPPER)
#define WNKERNEL_ROUND_UPPER(x) (x + 0x7fffu + (x >> 16 & 1u))
#endif

template <>
struct Convert<float, bf16> {
  using U32 = Vec<uint32_t>;
  using U16 = Raw<bf16, float>;
  WNKERNEL_INLINE Vec<float> widen(U16 raw) {
    return bit_cast<Vec<float>>(WNKERNEL_WIDEN_U16(raw) << 16);
  }
  WNKERNEL_INLINE U16 narrow(Vec<float> x) {
    const U32 bits = bit_cast<U32>(x);
    const U32 rounded = WNKERNEL_ROUND_UPPER(bits) >> 16;
    const U32 quiet_nan = U32{} + 0x7fc0u;
    return WNKERNEL_NARROW_U32(x == x ? rounded : quiet_nan);
  }
};

template <>
struct Convert<float, f16> {
  using U16 = Raw<f16, float>;
#if defined(WNKERNEL_WIDEN_HALF)
  WNKERNEL_INLINE Vec<float> widen(U16 raw) {
    return bit_cast<Vec<float>>(WNKERNEL_WIDEN_HALF(raw));
  }
  WNKERNEL_INLINE U16 narrow(Vec<float> x) { return bit_cast<U16>(WNKERNEL_NARROW_HALF(x)); }
#else
  WNKERNEL_INLINE Vec<float> widen(U16 raw) {
    Vec<float> out{};
    for (int64_t k = 0; k < kLanes<float>; ++k) out[k] = to_float(f16{raw[k]});
    return out;
  }
  WNKERNEL_INLINE U16 narrow(Vec<float> x) {
    U16 out{};
    for (int64_t k = 0; k < kLanes<float>; ++k) {
      f16 h;
      from_float(x[k], &h);
      out[k] = h.bits;
    }
    return out;
  }
#endif
};

template <class A, class T>
WNKERNEL_INLINE Vec<A> load(const T* p) {
  Raw<T, A> raw;
  __builtin_memcpy(&raw, p, sizeof raw);
  return Convert<A, T>::widen(raw);
}

template <class A, class T>
WNKERNEL_INLINE void store(T* p, Vec<A> x) {
  const Raw<T, A> raw = Convert<A, T>::narrow(x);
  __builtin_memcpy(p, &raw, sizeof raw);
}

// Loads the first n < kLanes<A> elements; the other lanes are 0.
template <class A, class T>
WNKERNEL_INLINE Vec<A> load_partial(const T* p, int64_t n) {
#if defined(WNKERNEL_MASKED_MOVES)
  return Convert<A, T>::widen(bit_cast<Raw<T, A>>(masked_load<sizeof(Raw<T, A>), sizeof(T)>(p, n)));
#else
#if defined(WNKERNEL_MASKED_LOAD)
  if constexpr (sizeof(T) >= 4 && sizeof(Raw<T, A>) == WNKERNEL_VECTOR_BYTES)
    return Convert<A, T>::widen(bit_cast<Raw<T, A>>(WNKERNEL_MASKED_LOAD(sizeof(T), p, n)));
#endif
  T padded[kLanes<A>] = {};
  for (int64_t k = 0; k < n; ++k) padded[k] = p[k];
  return load<A>(padded);
#endif
}

template <class A, class T>
WNKERNEL_INLINE void store_partial(T* p, Vec<A> x, int64_t n) {
#if defined(WNKERNEL_MASKED_MOVES)
  masked_store<sizeof(T)>(p, Convert<A, T>::narrow(x), n);
#else
  T padded[kLanes<A>];
  store<A>(padded, x);
  for (int64_t k = 0; k < n; ++k) p[k] = padded[k];
#endif
}

template <class A, class T>
constexpr bool kStreamable = sizeof(Raw<T, A>) >= 16 && sizeof(Raw<T, A>) <= WNKERNEL_VECTOR_BYTES;

// can_stream() says whether `count` vectors at a time may be streamed to every n-th element of p.
// store_streaming() does it; without WNKERNEL_STREAM it is an ordinary store.
template <class A, class T>
WNKERNEL_INLINE bool can_stream(const T* p, int64_t n, int64_t count) {
#if defined(WNKERNEL_STREAM)
  return reinterpret_cast<uintptr_t>(p) % (count * sizeof(Raw<T, A>)) == 0 &&
         n % (count * kLanes<A>) == 0 && kStreamable<A, T>;
#else
  return false;
#endif
}

template <class A, class T>
WNKERNEL_INLINE void store_streaming(T* p, Vec<A> x) {
#if defined(WNKERNEL_STREAM)
  if constexpr (kStreamable<A, T>) {
    stream<sizeof(Raw<T, A>)>(p, Convert<A, T>::narrow(x));
  }
#else
  store<A>(p, x);
#endif
}

template <class A>
struct Vec2 {
  Vec<A> first, second;
};

// Two vectors of 2 * kLanes<A> consecutive elements: their first and second half, or, interleaved
// (bf16 only), the elements at even and at odd places.
template <class A, bool interleaved, class T>
WNKERNEL_INLINE Vec2<A> load_two(const T* p) {
  if constexpr (interleaved) {
    Vec<uint32_t> raw;
    __builtin_memcpy(&raw, p, sizeof raw);
    return {bit_cast<Vec<A>>(raw << 16), bit_cast<Vec<A>>(raw & 0xffff0000u)};
  } else {
    return {load<A>(p), load<A>(p + kLanes<A>)};
  }
}

// Stores what interleaved loads return. x must hold no NaN other than the processor's own;
// exact_rows.h computes rows with NaN.
template <bool streaming>
WNKERNEL_INLINE void store_interleaved(bf16* p, Vec2<float> x) {
  using U32 = Vec<uint32_t>;
  const U32 even = bit_cast<U32>(x.first), odd = bit_cast<U32>(x.second);
  const U32 low = WNKERNEL_ROUND_UPPER(even) >> 16;
  const U32 high = WNKERNEL_ROUND_UPPER(odd) & 0xffff0000u;
  const Vec<float> packed = bit_cast<Vec<float>>(low | high);
  if constexpr (streaming) {
    store_streaming<float>(reinterpret_cast<float*>(p), packed);
  } else {
    __builtin_memcpy(p, &packed, sizeof packed);
  }
}

WNKERNEL_INLINE void finish_streaming() {
#if defined(WNKERNEL_STREAM)
  _mm_sfence();
#endif
}

// The source of lane l when two vectors are folded to blocks of `width` lanes: the low or the high
// half of a block of twice that width. All blocks of a come first, then all blocks of b.
constexpr int fold_source(int l, int width, int lanes, bool high) {
  const int half = lanes / width / 2, block = l / width;
  return (block < half ? 0 : lanes) + block % half * 2 * width + (high ? width : 0) + l % width;
}

template <class A, int width, int... l>
WNKERNEL_INLINE Vec<A> fold(Vec<A> a, Vec<A> b, std::integer_sequence<int, l...>) {
  constexpr int n = kLanes<A>;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, fold_source(l, width, n, false)...) +
         __builtin_shufflevector(a, b, fold_source(l, width, n, true)...);
#else
  using Lane = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  constexpr Vec<Lane> low = {fold_source(l, width, n, false)...};
  constexpr Vec<Lane> high = {fold_source(l, width, n, true)...};
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
#endif
}

// The horizontal sums of kLanes<A> / width vectors, reduced to blocks of `width` lanes; with width
// 1, one sum per lane. It adds in the same order as horizontal_sum(), with a fifth of its
// instructions.
template <class A, int width>
WNKERNEL_INLINE Vec<A> horizontal_sums(const Vec<A>* x) {
  if constexpr (width == kLanes<A>) {
    return x[0];
  } else {
    constexpr int64_t half = kLanes<A> / (2 * width);
    return fold<A, width>(horizontal_sums<A, 2 * width>(x), horizontal_sums<A, 2 * width>(x + half),
                          std::make_integer_sequence<int, kLanes<A>>());
  }
}

// Folds halves onto each other: log2(lanes) additions in a fixed order.
template <class A, int64_t bytes>
WNKERNEL_INLINE A horizontal_sum(typename VectorOf<A, bytes>::type x) {
  if constexpr (bytes > 16) {
    struct Halves {
      typename VectorOf<A, bytes / 2>::type low, high;
    };
    const Halves halves = bit_cast<Halves>(x);
    return horizontal_sum<A, bytes / 2>(halves.low + halves.high);
  } else if constexpr (sizeof(A) == 4) {
    return (x[0] + x[2]) + (x[1] + x[3]);
  } else {
    return x[0] + x[1];
  }
}

}  // namespace wnkernel::cpu::WNKERNEL_ISA
