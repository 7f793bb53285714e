#include "call/pytree.h"

#include "tensors/python_tensor.h"

#include <torch/csrc/Device.h>
#include <torch/csrc/Size.h>

#include <cstring>

namespace py = pybind11;

namespace graphcache {
namespace {

bool identical(PyObject* a, PyObject* b);

bool same_bits(double a, double b) {
  return std::memcmp(&a, &b, sizeof(a)) == 0;
}

bool same_attribute(PyObject* a, PyObject* b, const char* name) {
  const auto of_a = py::reinterpret_steal<py::object>(PyObject_GetAttrString(a, name));
  const auto of_b = py::reinterpret_steal<py::object>(PyObject_GetAttrString(b, name));
  return identical(of_a.ptr(), of_b.ptr());
}

// The same as keys and as constants, in every respect: 1, 1.0 and True differ, and so do 0.0 and -0.0.
// Objects of types that == may not tell apart are compared by identity.
bool identical(PyObject* a, PyObject* b) {
  if (a == b) {
    return true;
  }
  if (Py_TYPE(a) != Py_TYPE(b)) {
    return false;
  }
  if (PyFloat_CheckExact(a)) {
    return same_bits(PyFloat_AS_DOUBLE(a), PyFloat_AS_DOUBLE(b));
  }
  if (PyComplex_CheckExact(a)) {
    const auto of_a = PyComplex_AsCComplex(a);
    const auto of_b = PyComplex_AsCComplex(b);
    return same_bits(of_a.real, of_b.real) && same_bits(of_a.imag, of_b.imag);
  }
  if (PyTuple_CheckExact(a)) {
    const auto size = PyTuple_GET_SIZE(a);
    bool all = size == PyTuple_GET_SIZE(b);
    for (Py_ssize_t index = 0; all && index < size; ++index) {
      all = identical(PyTuple_GET_ITEM(a, index), PyTuple_GET_ITEM(b, index));
    }
    return all;
  }
  if (PySlice_Check(a) || PyRange_Check(a)) {
    return same_attribute(a, b, "start") && same_attribute(a, b, "stop") && same_attribute(a, b, "step");
  }
  if (!PyLong_CheckExact(a) && !PyUnicode_CheckExact(a) && !PyBytes_CheckExact(a) && !THPDevice_Check(a) &&
      !THPSize_Check(a)) {
    return false;
  }
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) {
    PyErr_Clear(); // values that can't be compared make another signature
  }
  return equal == 1;
}

// The `__dict__` of an object; null where it has none, or none yet.
PyObject* attributes_of(PyObject* object) {
  auto** slot = _PyObject_GetDictPtr(object);
  return slot == nullptr ? nullptr : *slot;
}

// No layout has attributes: with any, Python looks closer.
bool has_attributes(PyObject* object) {
  auto* attributes = attributes_of(object);
  return attributes != nullptr && PyDict_GET_SIZE(attributes) != 0;
}

} // namespace

void Leaves::add(PyObject* tensor) {
  objects.push_back(tensor);
  tensors.push_back(&tensor_in(tensor));
}

void Leaves::clear() {
  objects.clear();
  tensors.clear();
  owned.clear();
}

bool Layout::match(PyObject* value, Leaves& leaves) const {
  if (kind == Tensor) {
    if (!is_exact_tensor(value) || has_attributes(value)) {
      return false;
    }
    leaves.add(value);
    return true;
  }
  if (kind == Constant) {
    return identical(extra.ptr(), value);
  }
  if (kind == Object) {
    return object->serves(value);
  }
  if (reinterpret_cast<PyObject*>(Py_TYPE(value)) != type.ptr()) {
    return false;
  }
  return kind == Dict ? match_dict(value, leaves)
      : kind == Fields ? match_fields(value, leaves)
      : kind == Mapping ? match_mapping(value, leaves)
                        : match_items(value, leaves);
}

bool Layout::match_items(PyObject* value, Leaves& leaves) const {
  if (PySequence_Fast_GET_SIZE(value) != static_cast<Py_ssize_t>(children.size()) ||
      (kind == NamedTuple && has_attributes(value))) {
    return false;
  }
  for (size_t index = 0; index < children.size(); ++index) {
    if (!children[index].match(PySequence_Fast_GET_ITEM(value, index), leaves)) {
      return false;
    }
  }
  return true;
}

bool Layout::match_dict(PyObject* value, Leaves& leaves) const {
  if (PyDict_GET_SIZE(value) != static_cast<Py_ssize_t>(children.size())) {
    return false;
  }
  PyObject* key = nullptr;
  PyObject* item = nullptr;
  Py_ssize_t position = 0;
  for (size_t index = 0; PyDict_Next(value, &position, &key, &item); ++index) {
    if (!identical(keys[index].ptr(), key) || !children[index].match(item, leaves)) {
      return false;
    }
  }
  return true;
}

bool Layout::match_fields(PyObject* value, Leaves& leaves) const {
  auto* attributes = attributes_of(value);
  Py_ssize_t others = attributes == nullptr ? 0 : PyDict_GET_SIZE(attributes);
  for (size_t index = 0; index < children.size(); ++index) {
    auto item = py::reinterpret_steal<py::object>(PyObject_GetAttr(value, keys[index].ptr()));
    if (!item) {
      PyErr_Clear(); // a field without a value: Python looks closer
      return false;
    }
    if (!children[index].match(item.ptr(), leaves)) {
      return false;
    }
    leaves.owned.push_back(std::move(item));
    others -= attributes != nullptr && PyDict_Contains(attributes, keys[index].ptr()) == 1;
  }
  if (others != 0 || extra.is_none()) {
    return others == 0;
  }
  // transformers' ModelOutput is a dictionary too
  const auto present = py::reinterpret_steal<py::object>(PySequence_Tuple(value));
  if (!present) {
    PyErr_Clear();
    return false;
  }
  return identical(extra.ptr(), present.ptr());
}

// OrderedDict has an order of its own beside that of the dict, defaultdict a factory.
bool Layout::match_mapping(PyObject* value, Leaves& leaves) const {
  const auto present = py::reinterpret_steal<py::object>(PySequence_Fast(value, ""));
  if (!present || has_attributes(value)) {
    PyErr_Clear();
    return false;
  }
  if (PySequence_Fast_GET_SIZE(present.ptr()) != static_cast<Py_ssize_t>(children.size())) {
    return false;
  }
  for (size_t index = 0; index < children.size(); ++index) {
    PyObject* key = PySequence_Fast_GET_ITEM(present.ptr(), index);
    PyObject* item = identical(keys[index].ptr(), key) ? PyDict_GetItemWithError(value, key) : nullptr;
    if (item == nullptr || !children[index].match(item, leaves)) {
      PyErr_Clear();
      return false;
    }
  }
  return extra.is_none() || py::object(py::handle(value).attr("default_factory")).is(extra);
}

py::object Layout::build(std::vector<py::object>::const_iterator& tensors) const {
  switch (kind) {
    case Tensor:
      return *tensors++;
    case Constant:
      return extra;
    case Object:
      return object->object();
    case Tuple: {
      py::tuple made(children.size());
      for (size_t index = 0; index < children.size(); ++index) {
        PyTuple_SET_ITEM(made.ptr(), index, children[index].build(tensors).release().ptr());
      }
      return made;
    }
    case Dict: {
      py::dict made;
      for (size_t index = 0; index < children.size(); ++index) {
        made[keys[index]] = children[index].build(tensors);
      }
      return made;
    }
    default: {
      py::list items(children.size());
      for (size_t index = 0; index < children.size(); ++index) {
        PyList_SET_ITEM(items.ptr(), index, children[index].build(tensors).release().ptr());
      }
      return kind == List ? items : assemble(items);
    }
  }
}

} // namespace graphcache
