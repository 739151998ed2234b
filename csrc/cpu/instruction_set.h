// The choice between instruction sets, made once per process.
#pragma once
#include "primitives.h"

namespace wnkernel::cpu {

// The widest that this processor has, or the one that the environment variable WNKERNEL_CPU_ISA
// names if the processor has it.
const InstructionSet& instruction_set();

}  // namespace wnkernel::cpu
