// Operations with AVX-512 masks: partial vectors in one instruction, by the sizes of vector and
// element, and rounding; see vec.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace wnkernel::cpu::avx512 {

// x + 0x7fff, plus 1 where the upper half is odd, in three instructions instead of four.
template <class U32>
static inline __attribute__((always_inline)) U32 round_upper(U32 x) {
  const __m512i bits = (__m512i)x, up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  return (U32)_mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
}

static inline __attribute__((always_inline)) uint32_t first(int64_t n) { return (1u << n) - 1u; }

// Loads n elements of `element` bytes each into a vector of `bytes` bytes; the other lanes are 0.
template <int bytes, int element>
static inline __attribute__((always_inline)) auto masked_load(const void* p, int64_t n) {
  if constexpr (bytes == 64 && element == 4) {
    return _mm512_maskz_loadu_epi32(first(n), p);
  } else if constexpr (bytes == 64) {
    return _mm512_maskz_loadu_epi64(first(n), p);
  } else if constexpr (bytes == 128) {  // double grad_w of float weights
    struct {
      __m512i low, high;
    } pair{_mm512_maskz_loadu_epi64(first(n < 8 ? n : 8), p),
           _mm512_maskz_loadu_epi64(first(n < 8 ? 0 : n - 8), static_cast<const double*>(p) + 8)};
    return pair;
  } else {
    static_assert(bytes == 32 && element == 2);
    return _mm256_maskz_loadu_epi16(first(n), p);
  }
}

template <int element, class Raw>
static inline __attribute__((always_inline)) void masked_store(void* p, Raw raw, int64_t n) {
  constexpr int bytes = sizeof raw;
  if constexpr (bytes == 64 && element == 4) {
    _mm512_mask_storeu_epi32(p, first(n), (__m512i)raw);
  } else if constexpr (bytes == 64) {
    _mm512_mask_storeu_epi64(p, first(n), (__m512i)raw);
  } else if constexpr (bytes == 128) {
    struct {
      __m512i low, high;
    } pair;
    __builtin_memcpy(&pair, &raw, sizeof pair);
    _mm512_mask_storeu_epi64(p, first(n < 8 ? n : 8), pair.low);
    _mm512_mask_storeu_epi64(static_cast<double*>(p) + 8, first(n < 8 ? 0 : n - 8), pair.high);
  } else {
    static_assert(bytes == 32 && element == 2);
    _mm256_mask_storeu_epi16(p, first(n), (__m256i)raw);
  }
}

}  // namespace wnkernel::cpu::avx512
