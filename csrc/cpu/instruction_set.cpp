#include "instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace wnkernel {
namespace cpu {
namespace {

#if defined(__x86_64__)
bool has_avx2() {  // F16C comes with AVX2 on every processor, and clang 14 cannot ask for it
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const InstructionSet& choose() {
  const char* setting = std::getenv("WNKERNEL_CPU_ISA");
  const std::string wanted = setting ? setting : "";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool known = wanted == kAvx512.name || wanted == kAvx2.name || wanted == kBaseline.name;
  const std::string names = "avx512, avx2 or sse2";
#else
  const bool known = wanted == kBaseline.name;
  const std::string names = kBaseline.name;
#endif
  if (!wanted.empty() && !known)
    throw std::invalid_argument("WNKERNEL_CPU_ISA: expected " + names + ", got " + wanted);
#if defined(__x86_64__)
  if ((wanted.empty() || wanted == kAvx512.name) && has_avx512()) return kAvx512;
  if (wanted != kBaseline.name && has_avx2()) return kAvx2;
#endif
  return kBaseline;
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace cpu

const char* cpu_instruction_set() { return cpu::instruction_set().name; }

}  // namespace wnkernel
