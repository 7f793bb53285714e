#include "guards/expected.h"

#include "tensors/python_tensor.h"

#include <algorithm>
#include <cstring>
#include <string_view>

namespace py = pybind11;

namespace graphcache {
namespace {

// Tensors whose memory guards compare; torch's `swap_tensors` refuses those with weak references.
bool has_address(PyObject* object) {
  if (!is_exact_tensor(object)) {
    return false;
  }
  const auto& tensor = tensor_in(object);
  return tensor.layout() == c10::kStrided && tensor.has_storage() && !tensor.is_meta();
}

// Refers to no module, and so never to the guards that keep it. `deep`: tuples of tensors count, too.
bool refers_to_no_module(PyObject* object, bool deep) {
  if (PyTuple_Check(object)) {
    for (Py_ssize_t index = 0; index < PyTuple_GET_SIZE(object); ++index) {
      auto* item = PyTuple_GET_ITEM(object, index);
      if ((!deep && has_address(item)) || !refers_to_no_module(item, deep)) {
        return false;
      }
    }
    return true;
  }
  return object == Py_None || PyLong_Check(object) || PyFloat_Check(object) ||
      PyUnicode_Check(object) || PyBytes_Check(object) || PyComplex_Check(object) ||
      is_tensor(object);
}

py::object reference_to(PyObject* object, bool keep) {
  // A weak reference keeps nothing alive, so it may be held.
  if (refers_to_no_module(object, keep) || PyWeakref_Check(object)) {
    return py::reinterpret_borrow<py::object>(object);
  }
  if (auto* reference = PyWeakref_NewRef(object, nullptr)) {
    return py::reinterpret_steal<py::object>(reference);
  }
  PyErr_Clear();
  // An object that the cycle collector does not know (a dtype, a device) refers to nothing: held as well.
  return PyObject_IS_GC(object) ? py::object() : py::reinterpret_borrow<py::object>(object);
}

bool holds_tensor(PyObject* object) {
  if (!PyTuple_Check(object)) {
    return is_tensor(object);
  }
  for (Py_ssize_t index = 0; index < PyTuple_GET_SIZE(object); ++index) {
    if (holds_tensor(PyTuple_GET_ITEM(object, index))) {
      return true;
    }
  }
  return false;
}

// Calls `visit` with each object that this one refers to, until it returns false.
template <typename Visit>
void each_referent(PyObject* object, Visit visit) {
  Py_TYPE(object)->tp_traverse(
      object,
      [](PyObject* item, void* visit) { return (*static_cast<Visit*>(visit))(item) ? 0 : 1; },
      &visit);
}

// Tuples, and what Python itself made and never changes; iterators, frames and errors change.
bool is_known_by_items(PyObject* object) {
  const auto* type = Py_TYPE(object);
  const std::string_view name(type->tp_name);
  const bool of_python = name.find('.') == std::string_view::npos
      ? (type->tp_flags & Py_TPFLAGS_HEAPTYPE) == 0
      : name.rfind("operator.", 0) == 0 && (type->tp_flags & Py_TPFLAGS_IMMUTABLETYPE) != 0;
  return PyTuple_Check(object) ||
      (of_python && type->tp_traverse != nullptr && type->tp_iternext == nullptr && !PyDict_Check(object) &&
       !PyList_Check(object) && !PyAnySet_Check(object) && !PyCell_Check(object) && !PyFrame_Check(object) &&
       !PyTraceBack_Check(object) && !PyExceptionInstance_Check(object));
}

} // namespace

// Exact types only: no code of the user's runs here.
bool is_equal(PyObject* a, PyObject* b) {
  if (a == b || Py_TYPE(a) != Py_TYPE(b)) {
    return a == b;
  }
  if (PyFloat_CheckExact(a)) {
    // by bits: -0.0 is not 0.0, and nan is itself
    return std::memcmp(
               &reinterpret_cast<PyFloatObject*>(a)->ob_fval,
               &reinterpret_cast<PyFloatObject*>(b)->ob_fval,
               sizeof(double)) == 0;
  }
  if (PyTuple_CheckExact(a)) {
    bool equal = PyTuple_GET_SIZE(a) == PyTuple_GET_SIZE(b);
    for (Py_ssize_t index = 0; equal && index < PyTuple_GET_SIZE(a); ++index) {
      equal = is_equal(PyTuple_GET_ITEM(a, index), PyTuple_GET_ITEM(b, index));
    }
    return equal;
  }
  return (PyLong_CheckExact(a) || PyUnicode_CheckExact(a) || PyBytes_CheckExact(a)) &&
      PyObject_RichCompareBool(a, b, Py_EQ) == 1;
}

Expected::Expected(PyObject* object, bool keep, int depth) : address_(object) {
  if (object == nullptr) {
    return;
  }
  type_ = Py_TYPE(object);
  is_weak_tensor_ = !keep && has_address(object);
  if (is_weak_tensor_) {
    return;
  }
  object_ = reference_to(object, keep || depth == 0);
  by_items_ = !object_ && depth > 0 && is_known_by_items(object);
  if (!by_items_) {
    return;
  }
  std::vector<py::object> held; // a weak reference is an allocation, which may set off the cycle collector
  each_referent(object, [&](PyObject* item) {
    held.push_back(py::reinterpret_borrow<py::object>(item));
    return true;
  });
  for (const auto& item : held) {
    items_.emplace_back(item.ptr(), keep, depth - 1);
  }
}

Expected Expected::anything() {
  Expected free(nullptr);
  free.any_ = true;
  return free;
}

bool FreeSources::has(PyObject* container, PyObject* key) const {
  return std::any_of(places_.begin(), places_.end(), [&](const auto& place) {
    auto* const known = place.second.ptr();
    return place.first == container &&
        (known == key ||
         (PyUnicode_CheckExact(known) && PyUnicode_CheckExact(key) && PyUnicode_Compare(known, key) == 0) ||
         (PyLong_CheckExact(known) && PyLong_CheckExact(key) && PyObject_RichCompareBool(known, key, Py_EQ) == 1));
  });
}

bool FreeSources::has(PyObject* container, Py_ssize_t index) const {
  return std::any_of(places_.begin(), places_.end(), [&](const auto& place) {
    return place.first == container && PyLong_AsSsize_t(place.second.ptr()) == index;
  });
}

// The caller found something of the type at the address: if that refers to the same, it is the same.
bool Expected::refers_to_items() const {
  size_t index = 0;
  bool same = true;
  each_referent(address_, [&](PyObject* item) {
    same = index < items_.size() && items_[index].is(item);
    ++index;
    return same;
  });
  return same && index == items_.size();
}

bool Expected::is_gone() const {
  const bool is_weak = object_ && object_.ptr() != address_;
  const bool keeps_tensor = object_ && object_.ptr() == address_ && holds_tensor(address_);
  return (is_weak && !is_alive(object_.ptr())) || keeps_tensor || any_gone(items_);
}

int Expected::traverse(visitproc visit, void* arg) const {
  Py_VISIT(object_.ptr());
  return traverse_all(items_, visit, arg);
}

ExpectedDict::ExpectedDict(PyObject* dict, py::object names, bool held, const FreeSources& free)
    : dict_(dict), names_(std::move(names)) {
#if PY_VERSION_HEX < 0x030C0000
  if (!held) {
    kept_ = py::reinterpret_borrow<py::object>(dict);
  }
#else
  static_cast<void>(held);
#endif
  // Held meanwhile: a weak reference is an allocation, which may set off the cycle collector.
  const auto items = py::reinterpret_steal<py::list>(PyDict_Items(dict));
  for (const auto item : items) {
    auto* const key = PyTuple_GET_ITEM(item.ptr(), 0);
    if (counts(key)) {
      auto* const value = PyTuple_GET_ITEM(item.ptr(), 1);
      entries_.emplace_back(Expected(key), free.has(dict, key) ? Expected::anything() : Expected(value));
    }
  }
}

bool ExpectedDict::counts(PyObject* key) const {
  if (!names_.is_none() && PyUnicode_CheckExact(key) && PySet_Contains(names_.ptr(), key) != 1) {
    return false;
  }
  // torch.compile replaces the first two of nn.Module, and no forward of what exists already runs them;
  // the others are caches of Python: of what copies and pickles, and of annotations.
  if (PyUnicode_CheckExact(key)) {
    for (const auto* name : {"__init__", "__setstate__", "__slotnames__", "__annotations_cache__"}) {
      if (PyUnicode_CompareWithASCIIString(key, name) == 0) {
        return false;
      }
    }
  }
  return true;
}

bool ExpectedDict::is_gone() const {
  return std::any_of(entries_.begin(), entries_.end(), [](const auto& entry) {
    return entry.first.is_gone() || entry.second.is_gone();
  });
}

int ExpectedDict::traverse(visitproc visit, void* arg) const {
  Py_VISIT(kept_.ptr());
  for (const auto& [name, expected] : entries_) {
    if (const int stop = expected.traverse(visit, arg)) {
      return stop;
    }
  }
  return 0;
}

namespace {

// Calls `visit` with each item, until it returns false; without an iterator, which would be allocated.
template <typename Visit>
void each_item(PyObject* container, Visit visit) {
  if (PyList_Check(container)) {
    for (Py_ssize_t index = 0; index < PyList_GET_SIZE(container); ++index) {
      if (!visit(PyList_GET_ITEM(container, index))) {
        return;
      }
    }
    return;
  }
  const auto* set = reinterpret_cast<PySetObject*>(container);
  for (Py_ssize_t slot = 0; slot <= set->mask; ++slot) {
    const auto& entry = set->table[slot];
    // A slot that was given up holds a dummy, with a hash that no object has.
    if (entry.key != nullptr && entry.hash != -1 && !visit(entry.key)) {
      return;
    }
  }
}

} // namespace

ExpectedItems::ExpectedItems(PyObject* items, const FreeSources& free) : container_(items) {
  const auto held = py::reinterpret_steal<py::object>(PySequence_Tuple(items)); // as in ExpectedDict
  each_item(items, [&](PyObject* item) {
    const bool is_free = free.has(items, static_cast<Py_ssize_t>(items_.size()));
    items_.push_back(is_free ? Expected::anything() : Expected(item));
    return true;
  });
}

bool ExpectedItems::has_same(PyObject* container) const {
  size_t index = 0;
  bool same = true;
  each_item(container, [&](PyObject* item) {
    same = index < items_.size() && items_[index].is(item);
    ++index;
    return same;
  });
  return same && index == items_.size();
}

namespace {

// Calls `read` with its bytes; false where it has none to show any more.
template <typename Read>
bool with_bytes(const py::object& array, Read read) {
  Py_buffer view;
  if (PyObject_GetBuffer(array.ptr(), &view, PyBUF_FULL_RO) != 0) {
    PyErr_Clear();
    return false;
  }
  std::string copied; // of an array with gaps, such as a column
  const char* bytes = static_cast<const char*>(view.buf);
  if (PyBuffer_IsContiguous(&view, 'A') == 0) {
    copied.resize(static_cast<size_t>(view.len));
    if (PyBuffer_ToContiguous(copied.data(), &view, view.len, 'C') != 0) {
      PyErr_Clear();
      PyBuffer_Release(&view);
      return false;
    }
    bytes = copied.data();
  }
  const bool result = read(std::string_view(bytes, static_cast<size_t>(view.len)));
  PyBuffer_Release(&view);
  return result;
}

} // namespace

ExpectedBytes::ExpectedBytes(py::object array) : array_(std::move(array)) {
  with_bytes(array_, [&](std::string_view now) {
    bytes_ = now;
    return true;
  });
}

bool ExpectedBytes::same() const {
  return with_bytes(array_, [&](std::string_view now) { return now == bytes_; });
}

} // namespace graphcache
