// The Python module wnkernel._C. Loading it registers the operators. It also has two functions that
// call them with less overhead than torch.ops, the slots, and facts about its build.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>

#include "cpu/surroundings.h"
#include "cpu_buffers.h"
#include "cuda_devices.h"
#include "fastcall.h"
#include "ops.h"
#include "problem.h"
#include "slot.h"

namespace wnkernel {
namespace {

const char* type_name(PyObject* object) { return Py_TYPE(object)->tp_name; }

// Whether an object is a Tensor or a Parameter, and no subclass of these.
bool is_plain(PyObject* object) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == THPVariableClass || type == ParameterClass;
}

int64_t as_dim(PyObject* object) {
  if (object == Py_None) return kWholeTensor;
  TORCH_CHECK_TYPE(PyIndex_Check(object) && !PyBool_Check(object),
                   "dim: expected an int or None, got ", type_name(object));
  int overflow = 0;
  const long long dim = PyLong_AsLongLongAndOverflow(object, &overflow);
  if (dim == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  TORCH_CHECK_VALUE(!overflow, "dim: expected an int within the dimensions of v, got a huge one");
  return dim;
}

double as_eps(PyObject* object) {
  TORCH_CHECK_TYPE(PyFloat_Check(object) || PyLong_Check(object), "eps: expected a number, got ",
                   type_name(object));
  const double eps = PyFloat_AsDouble(object);
  if (PyErr_Occurred()) throw python_error();
  TORCH_CHECK_VALUE(eps >= 0.0 && std::isfinite(eps), "eps: expected a finite number >= 0, got ",
                    eps);
  return eps;
}

std::optional<at::ScalarType> as_dtype(PyObject* object) {
  if (object == Py_None) return std::nullopt;
  TORCH_CHECK_TYPE(THPDtype_Check(object), "out_dtype: expected a torch.dtype or None, got ",
                   type_name(object));
  return reinterpret_cast<THPDtype*>(object)->scalar_type;
}

// The CPU computes weights up to this size before another thread could make use of the GIL.
constexpr int64_t kHoldGil = 16384;

// Only small CPU weights hold the GIL. On a GPU the driver takes as long for a small weight as for
// a large one, and the allocation of w may have to wait for memory.
bool holds_gil(const at::Tensor& v) {
  const auto size = v.sym_numel().maybe_as_int();
  return v.is_cpu() && size && *size <= kHoldGil;
}

std::string py_cuda_reason([[maybe_unused]] c10::DeviceIndex device) {
#if defined(WNKERNEL_CUDA)
  return cuda_reason(device);
#else
  return "this module has no CUDA kernels";
#endif
}

// Whether this module has kernels for the device of a tensor.
bool has_kernels(const at::Tensor& t) {
#if defined(WNKERNEL_CUDA)
  if (t.is_cuda()) return cuda_reason(t.device().index()).empty();
#endif
  return t.is_cpu();
}

// Whether C++ can take a weight as it is. Throws on wrong layouts and devices: otherwise the
// dispatcher would choose by them before the operator checks its arguments, and report a missing
// kernel.
bool is_plain_native(PyObject* v, PyObject* g) {
  if (!is_plain(v) || !is_plain(g)) return false;
  check_placement(THPVariable_Unpack(v), THPVariable_Unpack(g));
  return has_kernels(THPVariable_Unpack(v));
}

// Whether something observes calls: a __torch_function__ mode, or the TorchScript tracer, whose
// graphs must also run where our operators are unknown.
bool is_observed() {
  return at::impl::torch_function_mode_enabled() || at::tracer::impl::is_dispatch_enabled();
}

// weight_norm(v, g, dim, eps, out_dtype), all positional. Returns NotImplemented if Python must
// handle the call: v or g is no plain tensor, the call is observed, or their device has no kernels.
PyObject* py_weight_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5, "weight_norm: expected 5 arguments, got ", count);
  if (is_observed() || !is_plain_native(args[0], args[1])) Py_RETURN_NOTIMPLEMENTED;
  const at::Tensor &v = THPVariable_Unpack(args[0]), &g = THPVariable_Unpack(args[1]);
  const int64_t dim = as_dim(args[2]);
  const double eps = as_eps(args[3]);
  const auto out_dtype = as_dtype(args[4]);
  std::optional<pybind11::gil_scoped_release> no_gil;
  if (!holds_gil(v)) no_gil.emplace();
  at::Tensor w = weight_norm(v, g, dim, eps, out_dtype);
  no_gil.reset();
  return THPVariable_Wrap(std::move(w));
  END_HANDLE_TH_ERRORS
}

// weight_norms(vs, gs, dims, eps, out_dtype) takes four lists of the same length, and returns
// NotImplemented like weight_norm().
PyObject* py_weight_norms(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 5 && std::all_of(args, args + 4, [](auto* x) { return PyList_Check(x); }),
      "weight_norms: expected four lists and a dtype");
  if (is_observed()) Py_RETURN_NOTIMPLEMENTED;
  const auto at = [&](int list, Py_ssize_t k) { return PyList_GET_ITEM(args[list], k); };
  const Py_ssize_t size = PyList_GET_SIZE(args[0]);
  for (int list = 1; list < 4; ++list)
    TORCH_CHECK_VALUE(PyList_GET_SIZE(args[list]) == size,
                      "weight_norms: expected lists of the same length");
  Tensors v(size), g(size);
  std::vector<int64_t> dim(size);
  std::vector<double> eps(size);
  for (Py_ssize_t k = 0; k < size; ++k) {
    if (!is_plain_native(at(0, k), at(1, k))) Py_RETURN_NOTIMPLEMENTED;
    v[k] = THPVariable_Unpack(at(0, k));
    g[k] = THPVariable_Unpack(at(1, k));
    dim[k] = as_dim(at(2, k));
    eps[k] = as_eps(at(3, k));
  }
  const auto out_dtype = as_dtype(args[4]);
  std::optional<pybind11::gil_scoped_release> no_gil(std::in_place);
  const Tensors results = forward(v, g, dim, eps, out_dtype);
  no_gil.reset();
  THPObjectPtr list(PyList_New(size));
  if (!list) throw python_error();
  for (Py_ssize_t k = 0; k < size; ++k)  // only every w; the norms follow in results
    PyList_SET_ITEM(list.get(), k, THPVariable_Wrap(results[k]));
  return list.release();
  END_HANDLE_TH_ERRORS
}

PyMethodDef kMethods[] = {
    {"weight_norm", fastcall(py_weight_norm), METH_FASTCALL,
     "weight_norm(v, g, dim, eps, out_dtype) -> w"},
    {"weight_norms", fastcall(py_weight_norms), METH_FASTCALL,
     "weight_norms(vs, gs, dims, eps, out_dtype) -> list of w"},
    {nullptr, nullptr, 0, nullptr},
};

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
#if defined(WNKERNEL_CUDA)
  info["devices"] = std::vector<std::string>{"cpu", "cuda"};
#else
  info["devices"] = std::vector<std::string>{"cpu"};
#endif
  info["cpu_instruction_set"] = cpu_instruction_set();
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

std::array<int64_t, 3> py_row_view(const at::Tensor& v, int64_t dim) {
  TORCH_CHECK_VALUE(v.numel() > 0 && v.is_non_overlapping_and_dense(),
                    "v: expected a dense, non-empty tensor, got shape ", v.sizes());
  const RowView view = row_view(v, canonical_dim(dim, v.dim()));
  return {view.outer, view.rows, view.inner};
}

pybind11::dict py_cpu_buffers() {
  const BufferStatistics statistics = cpu_buffer_statistics();
  pybind11::dict dict;
  dict["held_bytes"] = statistics.held_bytes;
  dict["used_bytes"] = statistics.used_bytes;
  return dict;
}

pybind11::dict facts(const cpu::Machine& machine) {
  pybind11::dict sources;
  sources["l1d"] = machine.sources.l1d;
  sources["l2"] = machine.sources.l2;
  sources["l3"] = machine.sources.l3;
  sources["page"] = machine.sources.page;
  pybind11::dict dict;
  dict["l1d"] = machine.l1d;
  dict["l2"] = machine.l2;
  dict["l3"] = machine.l3;
  dict["page"] = machine.page;
  dict["sources"] = sources;
  return dict;
}

pybind11::dict py_machine() { return facts(cpu::machine()); }

// Only tests call this.
pybind11::dict py_machine_in(std::string sysfs, std::vector<int> cpus, cpu::CpuidCaches cpuid) {
  return facts(cpu::machine_in({std::move(sysfs), std::move(cpus), std::move(cpuid)}));
}

}  // namespace
}  // namespace wnkernel

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of wnkernel; importing registers torch.ops.wnkernel.";
  m.def("build_info", wnkernel::build_info, "What this module was built with.");
  m.def("cuda_reason", wnkernel::py_cuda_reason,
        "Why kernels cannot run on a CUDA device; empty if they can.");
  m.def("row_view", wnkernel::py_row_view, "(outer, rows, inner) of a dense, non-empty tensor.");
  m.def("machine", wnkernel::py_machine, "Caches and pages of this machine; docs/performance.md.");
  m.def("machine_in", wnkernel::py_machine_in,
        "(sysfs, cpus, cpuid): the same of a machine that is made up, for tests.");
  m.def("cpu_buffers", wnkernel::py_cpu_buffers, "Bytes that idle buffers and tensors hold.");
  m.def("release_cpu_buffers", wnkernel::release_cpu_buffers, "Free all idle buffers.");
  if (PyModule_AddFunctions(m.ptr(), wnkernel::kMethods) != 0 || !wnkernel::add_slots(m.ptr()))
    throw pybind11::error_already_set();
}
