// Element types as storage, and their scalar conversions. Everything has internal linkage: this
// header is compiled once per instruction set, and the linker must not merge the copies.
#pragma once
#include <cstdint>
#include <cstring>

#include "../weight_norm.h"

namespace wnkernel::cpu {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
using f32 = float;
using f64 = double;

template <class V>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};

static inline int64_t element_size(DType t) {
  return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2;
}

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float to_float(bf16 h) { return bits_to_float(uint32_t{h.bits} << 16); }

static inline float to_float(f16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // After the shift the exponent is 112 too small. The product corrects it and also normalises
  // subnormals.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

static inline float to_float(float x) { return x; }
static inline float to_float(double x) { return static_cast<float>(x); }

static inline double to_double(double x) { return x; }
template <class T>
static inline double to_double(T x) {
  return to_float(x);
}

// The smallest and largest normal numbers of a type.
template <class T>
struct NormalRange;
template <>
struct NormalRange<f16> {
  static constexpr double kSmallest = 0x1p-14, kLargest = 65504;
};
template <>
struct NormalRange<bf16> {
  static constexpr double kSmallest = 0x1p-126, kLargest = 0x1.fep127;
};
template <>
struct NormalRange<float> {
  static constexpr double kSmallest = 0x1p-126, kLargest = 0x1.fffffep127;
};
template <>
struct NormalRange<double> {
  static constexpr double kSmallest = 0x1p-1022, kLargest = 0x1.fffffffffffffp1023;
};

// Rounds to nearest even; NaN stays NaN.
static inline void from_float(float x, bf16* out) {
  const uint32_t bits = float_to_bits(x);
  out->bits = (bits & 0x7fffffffu) > 0x7f800000u
                  ? 0x7fc0u
                  : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline void from_float(float x, f16* out) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 65536 and above, inf, NaN
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the addition rounds at the right bit
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

static inline void from_float(float x, float* out) { *out = x; }
static inline void from_float(float x, double* out) { *out = x; }

static inline void from_double(double x, double* out) { *out = x; }
// Half types are rounded twice: at a tie of a half type the last bit may differ from a single
// rounding.
template <class T>
static inline void from_double(double x, T* out) {
  from_float(static_cast<float>(x), out);
}

// x rounded to T, or x itself if the result is no normal number.
template <class T>
static inline double rounded(double x) {
  T held;
  from_double(x, &held);
  const double y = to_double(held);
  return y >= NormalRange<T>::kSmallest && y <= NormalRange<T>::kLargest ? y : x;
}

}  // namespace wnkernel::cpu
