// A slot holds w of one weight, and the state that v and g had when w was computed. Installations
// without this module use its twin wnkernel/grouping/slots.py, which says what counts as a change.
#include "slot.h"

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <memory>

#include "fastcall.h"
#include "problem.h"

namespace wnkernel {
namespace {

// A tensor as it was at one moment. It holds the storage, so that no other storage can take its
// address.
class Seen {
 public:
  explicit Seen(const at::Tensor& t)
      : tensor_(t),
        storage_(t.storage()),
        data_(t.const_data_ptr()),
        sizes_(t.sizes()),
        strides_(t.strides()),
        dtype_(t.scalar_type()),
        requires_grad_(t.requires_grad()),
        version_(version_of(t)) {}

  const at::Tensor& tensor() const { return tensor_; }

  bool is_current(const at::Tensor& t) const {
    return t.is_same(tensor_) && t.has_storage() &&
           t.storage().unsafeGetStorageImpl() == storage_.unsafeGetStorageImpl() &&
           t.const_data_ptr() == data_ && version_of(t) == version_ &&
           t.requires_grad() == requires_grad_ && t.sizes() == at::IntArrayRef(sizes_) &&
           t.strides() == at::IntArrayRef(strides_) && t.scalar_type() == dtype_;
  }

 private:
  at::Tensor tensor_;
  c10::Storage storage_;
  const void* data_;
  c10::SmallVector<int64_t, 4> sizes_, strides_;
  at::ScalarType dtype_;
  bool requires_grad_;
  int64_t version_;
};

struct Contents {
  Seen w, v, g;
};

struct Slot {
  PyObject_HEAD Contents* contents;
  bool taken;
};

Slot* as_slot(PyObject* self) { return reinterpret_cast<Slot*>(self); }

const at::Tensor& as_tensor(const char* name, PyObject* object) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), name, ": expected a torch.Tensor, got ",
                   Py_TYPE(object)->tp_name);
  return THPVariable_Unpack(object);
}

bool is_current(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  TORCH_CHECK_TYPE(count == 2, "expected v and g, got ", count, " arguments");
  const Contents& c = *as_slot(self)->contents;
  return c.v.is_current(as_tensor("v", args[0])) && c.g.is_current(as_tensor("g", args[1])) &&
         c.w.is_current(c.w.tensor());
}

PyObject* py_is_current(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  return PyBool_FromLong(is_current(self, args, count));
  END_HANDLE_TH_ERRORS
}

PyObject* py_take(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!is_current(self, args, count)) Py_RETURN_NONE;
  as_slot(self)->taken = true;
  return THPVariable_Wrap(as_slot(self)->contents->w.tensor());
  END_HANDLE_TH_ERRORS
}

PyObject* py_taken(PyObject* self, void*) { return PyBool_FromLong(as_slot(self)->taken); }

PyObject* py_nbytes(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  return PyLong_FromSize_t(as_slot(self)->contents->w.tensor().storage().nbytes());
  END_HANDLE_TH_ERRORS
}

void dealloc(PyObject* self) {
  delete as_slot(self)->contents;
  PyTypeObject* type = Py_TYPE(self);
  PyObject_Free(self);
  Py_DECREF(type);
}

PyTypeObject* slot_type() {
  static PyMethodDef methods[] = {
      {"take", fastcall(py_take), METH_FASTCALL, "take(v, g) -> w, or None if w is out of date"},
      {"is_current", fastcall(py_is_current), METH_FASTCALL, "is_current(v, g) -> bool"},
      {nullptr, nullptr, 0, nullptr},
  };
  static PyGetSetDef properties[] = {
      {"taken", py_taken, nullptr, "Whether take() ever returned w.", nullptr},
      {"nbytes", py_nbytes, nullptr, "Bytes of the memory of w.", nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr},
  };
  static PyType_Slot slots[] = {
      {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
      {Py_tp_methods, methods},
      {Py_tp_getset, properties},
      {0, nullptr},
  };
  static PyType_Spec spec = {"wnkernel._C.Slot", sizeof(Slot), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  static PyObject* const type = PyType_FromSpec(&spec);
  return reinterpret_cast<PyTypeObject*>(type);
}

THPObjectPtr new_slot(const at::Tensor& w, const at::Tensor& v, const at::Tensor& g) {
  PyTypeObject* type = slot_type();
  THPObjectPtr slot(PyObject_New(PyObject, type));
  if (!slot) throw python_error();
  as_slot(slot)->taken = false;
  as_slot(slot)->contents = nullptr;
  as_slot(slot)->contents = new Contents{Seen(w), Seen(v), Seen(g)};
  return slot;
}

// slots(ws, vs, gs) returns a list of slots from three lists of the same length.
PyObject* py_slots(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 3 && PyList_Check(args[0]) && PyList_Check(args[1]) && PyList_Check(args[2]),
      "slots: expected three lists");
  const Py_ssize_t size = PyList_GET_SIZE(args[0]);
  TORCH_CHECK_VALUE(PyList_GET_SIZE(args[1]) == size && PyList_GET_SIZE(args[2]) == size,
                    "slots: expected lists of the same length");
  THPObjectPtr list(PyList_New(size));
  if (!list) throw python_error();
  for (Py_ssize_t k = 0; k < size; ++k)
    PyList_SET_ITEM(list.get(), k,
                    new_slot(as_tensor("w", PyList_GET_ITEM(args[0], k)),
                             as_tensor("v", PyList_GET_ITEM(args[1], k)),
                             as_tensor("g", PyList_GET_ITEM(args[2], k)))
                        .release());
  return list.release();
  END_HANDLE_TH_ERRORS
}

PyObject* device_mode = nullptr;  // the type of the mode that torch.set_default_device() installs

bool find_device_mode() {
  THPObjectPtr module(PyImport_ImportModule("torch.utils._device"));
  if (!module) return false;
  device_mode = PyObject_GetAttrString(module, "DeviceContext");
  return device_mode != nullptr;
}

// Whether a __torch_function__ mode observes every call. The mode of torch.set_default_device()
// does not count: it only changes functions that make tensors.
bool calls_are_watched() {
  const int64_t count = at::impl::PythonTorchFunctionTLS::stack_len();
  for (int64_t k = 0; k < count; ++k) {
    PyObject* mode = at::impl::PythonTorchFunctionTLS::get_stack_at(k)->ptr(getPyInterpreter());
    if (reinterpret_cast<PyObject*>(Py_TYPE(mode)) != device_mode) return true;
  }
  return false;
}

bool must_run_alone() {
  return c10::impl::tls_is_dispatch_key_included(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         at::tracer::impl::is_dispatch_enabled() || calls_are_watched();
}

PyObject* py_launch_mode(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  if (must_run_alone()) return PyLong_FromLong(-1);
  const bool bits[] = {at::GradMode::is_enabled(), c10::InferenceMode::is_enabled(),
                       at::globalContext().deterministicAlgorithms()};
  int64_t mode = 0;
  for (const bool bit : bits) mode = 2 * mode + bit;
  return PyLong_FromLongLong(mode);
  END_HANDLE_TH_ERRORS
}

PyMethodDef kFunctions[] = {
    {"slots", fastcall(py_slots), METH_FASTCALL, "slots(ws, vs, gs) -> list[Slot]"},
    {"launch_mode", py_launch_mode, METH_NOARGS, "launch_mode() -> int; -1: each weight alone"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_slots(PyObject* module) {
  PyTypeObject* type = slot_type();
  return type && find_device_mode() && PyModule_AddType(module, type) == 0 &&
         PyModule_AddFunctions(module, kFunctions) == 0;
}

}  // namespace wnkernel
