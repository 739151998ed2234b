// Types of CUDA and conversions between them, which round to nearest, ties to even.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

namespace simt {

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Rounds away the last `drop` bits.
inline uint32_t round_bits(uint32_t bits, int drop) {
  const uint32_t half = uint32_t{1} << (drop - 1), odd = bits >> drop & 1;
  return (bits + half - 1 + odd) >> drop;
}

}  // namespace simt

inline float __bfloat162float(__nv_bfloat16 x) {
  return simt::bit_cast<float>(uint32_t{x.bits} << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>(simt::round_bits(simt::bit_cast<uint32_t>(x), 16))};
}

inline float __half2float(__half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = x.bits & 0x7fff;
  if (rest < 0x400) return std::copysign(static_cast<float>(rest) * 0x1p-24f, sign ? -1.f : 1.f);
  const uint32_t exponent = rest < 0x7c00 ? 112u << 23 : 224u << 23;  // keeps inf and NaN
  return simt::bit_cast<float>(sign | ((rest << 13) + exponent));
}

inline __half __float2half_rn(float x) {
  if (x != x) return {0x7fff};
  const float size = std::fabs(x);
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  uint32_t rest;
  if (size >= 65520.f)
    rest = 0x7c00;
  else if (size < 0x1p-14f)
    rest = static_cast<uint32_t>(std::nearbyint(size * 0x1p24f));
  else
    rest = simt::round_bits(simt::bit_cast<uint32_t>(size) - (112u << 23), 13);
  return {static_cast<uint16_t>(sign | rest)};
}
