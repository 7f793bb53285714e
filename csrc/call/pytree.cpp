#include "call/pytree.h"

#include "tensors/python_tensor.h"

#include <torch/csrc/Device.h>
#include <torch/csrc/Size.h>

#include <cstring>

namespace py = pybind11;

namespace graphcache {
namespace {

bool identical(PyObject* mine, PyObject* theirs);

bool same_bits(double mine, double theirs) {
  return std::memcmp(&mine, &theirs, sizeof(mine)) == 0;
}

bool same_attribute(PyObject* mine, PyObject* theirs, const char* name) {
  const auto a = py::reinterpret_steal<py::object>(PyObject_GetAttrString(mine, name));
  const auto b = py::reinterpret_steal<py::object>(PyObject_GetAttrString(theirs, name));
  return identical(a.ptr(), b.ptr());
}

// The same as keys and as constants, in every respect: 1, 1.0 and True differ, and so do 0.0 and -0.0. Of
// types that are not known to be told apart by ==, an object is the same as itself only.
bool identical(PyObject* mine, PyObject* theirs) {
  if (mine == theirs) {
    return true;
  }
  if (Py_TYPE(mine) != Py_TYPE(theirs)) {
    return false;
  }
  if (PyFloat_CheckExact(mine)) {
    return same_bits(PyFloat_AS_DOUBLE(mine), PyFloat_AS_DOUBLE(theirs));
  }
  if (PyComplex_CheckExact(mine)) {
    const auto a = PyComplex_AsCComplex(mine);
    const auto b = PyComplex_AsCComplex(theirs);
    return same_bits(a.real, b.real) && same_bits(a.imag, b.imag);
  }
  if (PyTuple_CheckExact(mine)) {
    const auto size = PyTuple_GET_SIZE(mine);
    bool all = size == PyTuple_GET_SIZE(theirs);
    for (Py_ssize_t index = 0; all && index < size; ++index) {
      all = identical(PyTuple_GET_ITEM(mine, index), PyTuple_GET_ITEM(theirs, index));
    }
    return all;
  }
  if (PySlice_Check(mine) || PyRange_Check(mine)) {
    return same_attribute(mine, theirs, "start") && same_attribute(mine, theirs, "stop") &&
        same_attribute(mine, theirs, "step");
  }
  if (!PyLong_CheckExact(mine) && !PyUnicode_CheckExact(mine) && !PyBytes_CheckExact(mine) &&
      !THPDevice_Check(mine) && !THPSize_Check(mine)) {
    return false;
  }
  const int equal = PyObject_RichCompareBool(mine, theirs, Py_EQ);
  if (equal < 0) {
    PyErr_Clear(); // what can't be compared is another signature
  }
  return equal == 1;
}

// The `__dict__` of an object; null where it has none, or none yet.
PyObject* attributes_of(PyObject* object) {
  auto** slot = _PyObject_GetDictPtr(object);
  return slot == nullptr ? nullptr : *slot;
}

// No layout has them: with any, Python looks closer.
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

Tree::Tree(const py::handle& layout) {
  const auto parts = py::cast<py::tuple>(layout);
  kind_ = static_cast<Kind>(py::cast<int>(parts[0]));
  type_ = parts[1];
  for (const auto key : parts[2]) {
    keys_.push_back(py::reinterpret_borrow<py::object>(key));
  }
  for (const auto child : parts[3]) {
    children_.emplace_back(child);
  }
  extra_ = parts[4];
  make_ = parts[5];
  if (kind_ == ObjectRef) {
    object_ = py::cast<std::shared_ptr<StaticObject>>(extra_);
  }
}

bool Tree::match(PyObject* value, Leaves& leaves) const {
  if (kind_ == Slot) {
    if (!is_exact_tensor(value) || has_attributes(value)) {
      return false;
    }
    leaves.add(value);
    return true;
  }
  if (kind_ == Constant) {
    return identical(extra_.ptr(), value);
  }
  if (kind_ == ObjectRef) {
    return object_->serves(value);
  }
  if (reinterpret_cast<PyObject*>(Py_TYPE(value)) != type_.ptr()) {
    return false;
  }
  switch (kind_) {
    case List:
    case Tuple:
    case NamedTuple: {
      if (PySequence_Fast_GET_SIZE(value) != static_cast<Py_ssize_t>(children_.size()) ||
          (kind_ == NamedTuple && has_attributes(value))) {
        return false;
      }
      for (size_t index = 0; index < children_.size(); ++index) {
        if (!children_[index].match(PySequence_Fast_GET_ITEM(value, index), leaves)) {
          return false;
        }
      }
      return true;
    }
    case Dict: {
      if (PyDict_GET_SIZE(value) != static_cast<Py_ssize_t>(children_.size())) {
        return false;
      }
      PyObject* key = nullptr;
      PyObject* item = nullptr;
      Py_ssize_t position = 0;
      for (size_t index = 0; PyDict_Next(value, &position, &key, &item); ++index) {
        if (!identical(keys_[index].ptr(), key) || !children_[index].match(item, leaves)) {
          return false;
        }
      }
      return true;
    }
    case Fields:
      return match_fields(value, leaves);
    default:
      return match_mapping(value, leaves);
  }
}

bool Tree::match_fields(PyObject* value, Leaves& leaves) const {
  auto* attributes = attributes_of(value);
  Py_ssize_t besides = attributes == nullptr ? 0 : PyDict_GET_SIZE(attributes);
  for (size_t index = 0; index < children_.size(); ++index) {
    auto item = py::reinterpret_steal<py::object>(PyObject_GetAttr(value, keys_[index].ptr()));
    if (!item) {
      PyErr_Clear(); // a field without a value: Python looks closer
      return false;
    }
    if (!children_[index].match(item.ptr(), leaves)) {
      return false;
    }
    leaves.owned.push_back(std::move(item));
    besides -= attributes != nullptr && PyDict_Contains(attributes, keys_[index].ptr()) == 1;
  }
  if (besides != 0) {
    return false;
  }
  // transformers' ModelOutput is a dictionary too
  if (extra_.is_none()) {
    return true;
  }
  const auto keys = py::reinterpret_steal<py::object>(PySequence_Tuple(value));
  if (!keys) {
    PyErr_Clear();
    return false;
  }
  return identical(extra_.ptr(), keys.ptr());
}

// OrderedDict keeps an order of its own beside that of the dict, defaultdict a factory.
bool Tree::match_mapping(PyObject* value, Leaves& leaves) const {
  const auto keys = py::reinterpret_steal<py::object>(PySequence_Fast(value, ""));
  if (!keys || has_attributes(value)) {
    PyErr_Clear();
    return false;
  }
  if (PySequence_Fast_GET_SIZE(keys.ptr()) != static_cast<Py_ssize_t>(children_.size())) {
    return false;
  }
  for (size_t index = 0; index < children_.size(); ++index) {
    PyObject* key = PySequence_Fast_GET_ITEM(keys.ptr(), index);
    PyObject* item = identical(keys_[index].ptr(), key) ? PyDict_GetItemWithError(value, key) : nullptr;
    if (item == nullptr || !children_[index].match(item, leaves)) {
      PyErr_Clear();
      return false;
    }
  }
  return extra_.is_none() ||
      py::object(py::handle(value).attr("default_factory")).is(extra_);
}

py::object Tree::build(std::vector<py::object>::const_iterator& tensors) const {
  switch (kind_) {
    case Slot:
      return *tensors++;
    case Constant:
      return extra_;
    case ObjectRef:
      return object_->object();
    case Tuple: {
      py::tuple made(children_.size());
      for (size_t index = 0; index < children_.size(); ++index) {
        PyTuple_SET_ITEM(made.ptr(), index, children_[index].build(tensors).release().ptr());
      }
      return made;
    }
    case Dict: {
      py::dict made;
      for (size_t index = 0; index < children_.size(); ++index) {
        const auto item = children_[index].build(tensors);
        if (PyDict_SetItem(made.ptr(), keys_[index].ptr(), item.ptr()) != 0) {
          throw py::error_already_set();
        }
      }
      return made;
    }
    default: {
      py::list items(children_.size());
      for (size_t index = 0; index < children_.size(); ++index) {
        PyList_SET_ITEM(items.ptr(), index, children_[index].build(tensors).release().ptr());
      }
      return kind_ == List ? items : make_(items);
    }
  }
}

} // namespace graphcache
