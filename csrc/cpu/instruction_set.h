// The choice between instruction sets, made once per process.
#pragma once
#include "primitives.h"

namespace wnkernel::cpu {

// The widest instruction set of this processor, or the one that the environment variable
// WNKERNEL_CPU_ISA names. If the processor lacks that one, the next narrower is chosen. Throws
// std::invalid_argument for an unknown name.
const InstructionSet& instruction_set();

}  // namespace wnkernel::cpu
