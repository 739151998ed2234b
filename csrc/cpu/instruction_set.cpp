#include "instruction_set.h"

#include <cstdlib>
#include <cstring>

namespace wnkernel {
namespace cpu {
namespace {

const InstructionSet& choose() {
  const char* wanted = std::getenv("WNKERNEL_CPU_ISA");
  const auto allowed = [&](const InstructionSet& set) {
    return !wanted || std::strcmp(wanted, set.name) == 0;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (allowed(kAvx512) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return kAvx512;
  if ((allowed(kAvx2) || allowed(kAvx512)) && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return kAvx2;
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
