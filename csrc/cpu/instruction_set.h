// The choice between instruction sets, made once per process.
#pragma once
#include "primitives.h"

namespace wnkernel::cpu {

// The widest that this processor has, or the one that the environment variable WNKERNEL_CPU_ISA
// names or, where the processor lacks that one, the next narrower. Throws std::invalid_argument for
// a name that there is not.
const InstructionSet& instruction_set();

}  // namespace wnkernel::cpu
