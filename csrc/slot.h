// The Python type wnkernel._C.Slot, and the other questions that a group (wnkernel/grouping/) asks
// on every read.
#pragma once
#include <torch/csrc/python_headers.h>

namespace wnkernel {

// Adds Slot, slots() and launch_mode() to the module. Returns false and sets a Python error on
// failure.
bool add_slots(PyObject* module);

}  // namespace wnkernel
