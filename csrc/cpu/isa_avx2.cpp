// AVX2 kernels (with FMA and F16C). On other processors this file is empty.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define WNKERNEL_ISA avx2
#define WNKERNEL_VECTOR_BYTES 32
#define WNKERNEL_WIDEN_HALF(raw) _mm256_cvtph_ps(bit_cast<__m128i>(raw))
#define WNKERNEL_NARROW_HALF(x) _mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT)
#define WNKERNEL_MASKED_LOAD(bytes, p, n) masked_load<bytes>(p, n)
#define WNKERNEL_ROUND_PRODUCT(x) asm("" : "+x"(x))
#define WNKERNEL_STREAM
#include "x86_stream.h"

#include "avx2_masked.h"
#include "primitives_impl.h"  // must follow the files that it builds on

namespace wnkernel::cpu {
constexpr InstructionSet kAvx2 = avx2::make("avx2");
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
