// AVX-512 kernels (F, BW, DQ, VL). On other processors this file is empty.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#define WNKERNEL_ISA avx512
#define WNKERNEL_VECTOR_BYTES 64
// These are the masked forms, because gcc 12 warns about the undefined source operand of the plain
// ones (PR105593).
#define WNKERNEL_WIDEN_HALF(raw) _mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(raw))
#define WNKERNEL_NARROW_HALF(x) \
  _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT)
// Each is one instruction, where gcc 12 would convert halves and join them.
#define WNKERNEL_WIDEN_U16(raw) \
  bit_cast<U32>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(raw)))
#define WNKERNEL_NARROW_U32(x) \
  bit_cast<U16>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(x)))
#define WNKERNEL_ROUND_UPPER(x) round_upper(x)
#define WNKERNEL_MASKED_MOVES
#define WNKERNEL_STREAM
#include "x86_stream.h"

#include "avx512_masked.h"
#include "primitives_impl.h"  // must follow the files that it builds on

namespace wnkernel::cpu {
constexpr InstructionSet kAvx512 = avx512::make("avx512");
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
