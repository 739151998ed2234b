// The Python type wnkernel._C.Slot, and what else a group (wnkernel/grouping/) asks on every read.
#pragma once
#include <torch/csrc/python_headers.h>

namespace wnkernel {

// Adds Slot, slots() and launch_mode() to the module. Returns false with a Python error set.
bool add_slots(PyObject* module);

}  // namespace wnkernel
