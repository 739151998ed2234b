// Makes methods of Python functions that take their arguments as an array instead of a tuple.
#pragma once
#include <torch/csrc/python_headers.h>

namespace wnkernel {

inline PyCFunction fastcall(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace wnkernel
