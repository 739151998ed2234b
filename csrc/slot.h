// The Python type wnkernel._C.Slot, and the other functions that a group calls on every read.
#pragma once
#include <torch/csrc/python_headers.h>

namespace wnkernel {

// Adds Slot, slots() and launch_mode() to the module. Returns false if a Python error is set.
bool add_slots(PyObject* module);

}  // namespace wnkernel
