// Stores past the caches, by size of vector; see vec.h. Each instruction set includes this file.
#pragma once
#include <immintrin.h>

namespace wnkernel::cpu::WNKERNEL_ISA {

template <int bytes, class Raw>
static inline __attribute__((always_inline)) void stream(void* p, Raw raw) {
  static_assert(sizeof raw == bytes);
  if constexpr (bytes == 16) {
    _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)raw);
#if WNKERNEL_VECTOR_BYTES == 64
  } else if constexpr (bytes == 64) {
    _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)raw);
#endif
  } else {
    static_assert(bytes == 32);
    _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)raw);
  }
}

}  // namespace wnkernel::cpu::WNKERNEL_ISA
