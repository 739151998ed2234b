// Kernels for the instructions that the compiler assumes on every processor of the platform: SSE2
// on x86-64, NEON (with its half conversions) on 64-bit Arm, plain code elsewhere.
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__aarch64__)
#include <arm_neon.h>
#define WNKERNEL_WIDEN_HALF(raw) vcvt_f32_f16(vreinterpret_f16_u16(bit_cast<uint16x4_t>(raw)))
#define WNKERNEL_NARROW_HALF(x) vreinterpret_u16_f16(vcvt_f16_f32(bit_cast<float32x4_t>(x)))
#define WNKERNEL_BASELINE_NAME "neon"
#elif defined(__x86_64__)
#define WNKERNEL_BASELINE_NAME "sse2"
#else
#define WNKERNEL_BASELINE_NAME "plain"
#endif
#define WNKERNEL_ISA baseline
#define WNKERNEL_VECTOR_BYTES 16
#include "primitives_impl.h"

namespace wnkernel::cpu {
constexpr InstructionSet kBaseline = baseline::make(WNKERNEL_BASELINE_NAME);
}
