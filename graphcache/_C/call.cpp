// `__call__` of a decorated forward. wrapt's own takes a microsecond to find out what it wraps; this asks
// the dispatcher first, and leaves to wrapt what that does not serve.
#include "dispatcher.h"

#include <torch/csrc/Exceptions.h>

namespace py = pybind11;

namespace graphcache {
namespace {

PyObject* interned(const char* text) {
  return PyUnicode_InternFromString(text);
}

py::object attribute(PyObject* object, PyObject* name) {
  auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!found) {
    throw py::error_already_set();
  }
  return found;
}

// torch.compile: it has to see the Python frames behind the call.
bool is_compiling() {
  static PyObject* const callback =
      py::object(py::module_::import("torch._C._dynamo.eval_frame").attr("get_eval_frame_callback"))
          .release()
          .ptr();
  const auto found = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(callback));
  if (!found) {
    throw py::error_already_set();
  }
  return !found.is_none();
}

// `dispatchers`: see `_Caches.by_id` in decorators.py. `instance`: what the forward is bound to.
py::object serve(PyObject* dispatchers, PyObject* key, PyObject* instance, PyObject* args, PyObject* kwargs) {
  PyObject* found = PyDict_GetItemWithError(dispatchers, key);
  if (found == nullptr) {
    return Dispatcher::miss();
  }
  const auto held = py::reinterpret_borrow<py::object>(found); // what it serves may clear it
  auto* dispatcher = static_cast<Dispatcher*>(PyCapsule_GetPointer(PyTuple_GET_ITEM(found, 2), nullptr));
  return dispatcher->serve(args, kwargs, instance);
}

py::object serve_own(PyObject* self, PyObject* args, PyObject* kwargs) {
  static PyObject* const name = interned("_self_served");
  const auto served = attribute(self, name); // (dispatchers, key, weak reference to the instance or None)
  PyObject* reference = PyTuple_GET_ITEM(served.ptr(), 2);
  py::object instance = py::none();
  if (reference != Py_None) {
    instance = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(reference));
  }
  return serve(
      PyTuple_GET_ITEM(served.ptr(), 0), PyTuple_GET_ITEM(served.ptr(), 1), instance.ptr(), args, kwargs);
}

py::object serve_bound(PyObject* self, PyObject* args, PyObject* kwargs) {
  static PyObject* const of_instance = interned("_self_instance");
  static PyObject* const of_parent = interned("_self_parent");
  static PyObject* const name = interned("_self_served");
  const auto instance = attribute(self, of_instance);
  if (instance.is_none()) { // called through the class
    return Dispatcher::miss();
  }
  const auto served = attribute(attribute(self, of_parent).ptr(), name);
  const auto key = py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(instance.ptr()));
  return serve(PyTuple_GET_ITEM(served.ptr(), 0), key.ptr(), instance.ptr(), args, kwargs);
}

using Serve = py::object (*)(PyObject*, PyObject*, PyObject*);

template <Serve serve>
PyObject* call(PyObject* self, PyObject* args, PyObject* kwargs) {
  HANDLE_TH_ERRORS
  if (!is_compiling()) {
    auto result = serve(self, args, kwargs);
    if (!result.is(Dispatcher::miss())) {
      return result.release().ptr();
    }
  }
  static PyObject* const name = interned("_unserved_call");
  const auto unserved = attribute(reinterpret_cast<PyObject*>(Py_TYPE(self)), name);
  const auto given = py::reinterpret_steal<py::tuple>(PyTuple_New(PyTuple_GET_SIZE(args) + 1));
  PyTuple_SET_ITEM(given.ptr(), 0, Py_NewRef(self));
  for (Py_ssize_t index = 0; index < PyTuple_GET_SIZE(args); ++index) {
    PyTuple_SET_ITEM(given.ptr(), index + 1, Py_NewRef(PyTuple_GET_ITEM(args, index)));
  }
  return PyObject_Call(unserved.ptr(), given.ptr(), kwargs);
  END_HANDLE_TH_ERRORS
}

template <Serve serve>
void define_call(py::type& type) {
  static PyMethodDef definition = {
      "__call__",
      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call<serve>)),
      METH_VARARGS | METH_KEYWORDS,
      nullptr};
  type.attr("_unserved_call") = type.attr("__call__");
  type.attr("__call__") = py::reinterpret_steal<py::object>(
      PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &definition));
}

} // namespace

void bind_call(py::module_& m) {
  m.def("serve_calls", &define_call<serve_own>, py::arg("type"));
  m.def("serve_bound_calls", &define_call<serve_bound>, py::arg("type"));
}

} // namespace graphcache
