#include "noted.h"

#include <torch/csrc/autograd/python_variable.h>

namespace py = pybind11;

namespace graphcache {
namespace {

bool is_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass)) != 0;
}

// Cannot lead to a module, and so never back to the guards that keep it.
bool is_plain(PyObject* object) {
  if (PyTuple_Check(object)) {
    for (Py_ssize_t index = 0; index < PyTuple_GET_SIZE(object); ++index) {
      if (!is_plain(PyTuple_GET_ITEM(object, index))) {
        return false;
      }
    }
    return true;
  }
  return object == Py_None || PyLong_Check(object) || PyFloat_Check(object) ||
      PyUnicode_Check(object) || PyBytes_Check(object) || PyComplex_Check(object) ||
      is_tensor(object);
}

py::object keeper_of(PyObject* object) {
  if (is_plain(object)) {
    return py::reinterpret_borrow<py::object>(object);
  }
  if (auto* reference = PyWeakref_NewRef(object, nullptr)) {
    return py::reinterpret_steal<py::object>(reference);
  }
  PyErr_Clear();
  // What the cycle collector does not know of (a dtype, a device) refers to nothing: kept as well.
  return PyObject_IS_GC(object) ? py::object() : py::reinterpret_borrow<py::object>(object);
}

} // namespace

Noted::Noted(PyObject* object) : address_(object), keeper_(keeper_of(object)) {}

int Noted::traverse(visitproc visit, void* arg) const {
  Py_VISIT(keeper_.ptr());
  return 0;
}

Table::Table(PyObject* dict) : dict_(dict) {
  // Held meanwhile: a weak reference is an allocation, which may set off the cycle collector.
  const auto items = py::reinterpret_steal<py::list>(PyDict_Items(dict));
  for (const auto item : items) {
    entries_.emplace_back(
        Noted(PyTuple_GET_ITEM(item.ptr(), 0)), Noted(PyTuple_GET_ITEM(item.ptr(), 1)));
  }
}

bool Table::same() const {
  if (!PyDict_Check(dict_) || PyDict_GET_SIZE(dict_) != static_cast<Py_ssize_t>(entries_.size())) {
    return false;
  }
  Py_ssize_t position = 0;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  for (const auto& [name, expected] : entries_) {
    if (PyDict_Next(dict_, &position, &key, &value) == 0 || !name.is(key) || !expected.is(value)) {
      return false;
    }
  }
  return true;
}

int Table::traverse(visitproc visit, void* arg) const {
  for (const auto& [name, expected] : entries_) {
    if (const int stop = expected.traverse(visit, arg)) {
      return stop;
    }
  }
  return 0;
}

} // namespace graphcache
