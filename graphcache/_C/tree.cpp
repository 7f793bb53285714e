#include "tree.h"

#include <torch/csrc/autograd/python_variable.h>

#include <cstring>

namespace py = pybind11;

namespace graphcache {
namespace {

// Equal as keys and as constants: of the same type, so that 1, 1.0 and True differ.
bool same(PyObject* mine, PyObject* theirs) {
  if (mine == theirs) {
    return true;
  }
  if (Py_TYPE(mine) != Py_TYPE(theirs)) {
    return false;
  }
  const int equal = PyObject_RichCompareBool(mine, theirs, Py_EQ);
  if (equal < 0) {
    PyErr_Clear(); // what can't be compared is another signature
  }
  return equal == 1;
}

} // namespace

void Leaves::add(PyObject* tensor) {
  objects.push_back(tensor);
  tensors.push_back(&THPVariable_Unpack(tensor));
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
  if (kind_ == Kept) {
    keeper_ = py::cast<std::shared_ptr<Keeper>>(extra_);
  }
}

bool Tree::match(PyObject* value, Leaves& leaves) const {
  if (kind_ == Slot) {
    if (!THPVariable_CheckExact(value)) {
      return false;
    }
    leaves.add(value);
    return true;
  }
  if (kind_ == Constant) {
    return match_constant(value);
  }
  if (kind_ == Kept) {
    return keeper_->serves(value);
  }
  if (reinterpret_cast<PyObject*>(Py_TYPE(value)) != type_.ptr()) {
    return false;
  }
  switch (kind_) {
    case List:
    case Tuple:
    case NamedTuple: {
      if (PySequence_Fast_GET_SIZE(value) != static_cast<Py_ssize_t>(children_.size())) {
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
        if (!same(keys_[index].ptr(), key) || !children_[index].match(item, leaves)) {
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

bool Tree::match_constant(PyObject* value) const {
  PyObject* mine = extra_.ptr();
  if (value == mine) {
    return true;
  }
  if (PyFloat_CheckExact(mine) && PyFloat_CheckExact(value)) {
    // By bits: a graph bakes in -0.0 or 0.0, whichever it saw.
    const double a = PyFloat_AS_DOUBLE(mine);
    const double b = PyFloat_AS_DOUBLE(value);
    return std::memcmp(&a, &b, sizeof(a)) == 0;
  }
  return !PyComplex_CheckExact(mine) && same(mine, value);
}

bool Tree::match_fields(PyObject* value, Leaves& leaves) const {
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
  return same(extra_.ptr(), keys.ptr());
}

// OrderedDict keeps an order of its own beside that of the dict, defaultdict a factory.
bool Tree::match_mapping(PyObject* value, Leaves& leaves) const {
  const auto keys = py::reinterpret_steal<py::object>(PySequence_Fast(value, ""));
  if (!keys) {
    PyErr_Clear();
    return false;
  }
  if (PySequence_Fast_GET_SIZE(keys.ptr()) != static_cast<Py_ssize_t>(children_.size())) {
    return false;
  }
  for (size_t index = 0; index < children_.size(); ++index) {
    PyObject* key = PySequence_Fast_GET_ITEM(keys.ptr(), index);
    PyObject* item = same(keys_[index].ptr(), key) ? PyDict_GetItemWithError(value, key) : nullptr;
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
    case Kept:
      return keeper_->object();
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
