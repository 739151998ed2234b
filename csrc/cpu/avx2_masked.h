// Partial vectors of the element sizes for which AVX2 has masked loads; see vec.h. Masked stores
// are slow on some processors, so there are none.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace wnkernel::cpu::avx2 {

// Loads n elements of `bytes` bytes each; the other lanes are 0.
template <int bytes>
static inline __attribute__((always_inline)) __m256i masked_load(const void* p, int64_t n) {
  if constexpr (bytes == 4) {
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), places);
    return _mm256_maskload_epi32(static_cast<const int*>(p), mask);
  } else {
    static_assert(bytes == 8);
    const __m256i mask = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
    return _mm256_maskload_epi64(static_cast<const long long*>(p), mask);
  }
}

}  // namespace wnkernel::cpu::avx2
