// Objects and dicts as they were once, to be recognised later by address.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace graphcache {

// One object. Its address stands for it only while it lives, so plain values are kept alive. Tensors are not: they
// may be large, and `Guard::add_tensor` compares the memory of whatever tensor is at that address.
// Other objects are known by a weak reference, since they may refer to the owner of this. Lists, dicts and
// sets allow none: they are known by their address, as their contents are compared. All else that allows
// none (tuples, slices, properties) is known by its type and by what it refers to.
class Expected {
 public:
  // null: nothing is to be there. `keep`: keep a tensor alive, too. `depth`: how deep objects are known by what they
  // refer to.
  explicit Expected(PyObject* object, bool keep = false, int depth = 4);

  // The same object; or, of numbers and texts, one of the same type and value.
  bool is(PyObject* object) const;
  int traverse(visitproc visit, void* arg) const;

 private:
  bool equals(PyObject* object) const;
  bool refers_to_items() const;

  PyObject* address_;
  pybind11::object object_; // the object itself, a weak reference to it, or nothing
  PyTypeObject* tensor_type_ = nullptr; // of a tensor that is not kept alive
  PyTypeObject* type_ = nullptr; // of one that is known by its items; never read
  std::vector<Expected> items_; // what it refers to
};

// True if the object of a weak reference still lives.
inline bool is_alive(PyObject* reference) {
  return reinterpret_cast<PyWeakReference*>(reference)->wr_object != Py_None;
}

inline bool Expected::is(PyObject* object) const {
  if (object != address_) {
    return object != nullptr && equals(object);
  }
  if (tensor_type_ != nullptr) {
    return Py_TYPE(object) == tensor_type_;
  }
  return object_ ? object_.ptr() == address_ || is_alive(object_.ptr()) : type_ == nullptr || refers_to_items();
}

// Shows Python's cycle collector all of some things, until it stops.
template <typename Things>
int traverse_all(const Things& things, visitproc visit, void* arg) {
  for (const auto& thing : things) {
    if (const int stop = thing.traverse(visit, arg)) {
      return stop;
    }
  }
  return 0;
}

// The keys and values of one dict, in their order.
class ExpectedDict {
 public:
  // `names`: a frozenset of the keys that count, besides those that are no strings; None: all do. A dict
  // that is not `held` is kept alive before Python 3.12, where nobody can ask whether it lives.
  ExpectedDict(PyObject* dict, pybind11::object names, bool held);

  // True if the dict is as it was; whoever asks knows that it lives.
  bool same() const { return !changed().has_value(); }
  // The first key that is not as it was, or a null one where something came on top.
  std::optional<pybind11::object> changed() const;
  int traverse(visitproc visit, void* arg) const;

 private:
  bool counts(PyObject* key) const;

  PyObject* dict_;
  pybind11::object kept_; // the dict itself, or nothing
  pybind11::object names_;
  std::vector<std::pair<Expected, Expected>> entries_;
};

// The items of one list or set.
class ExpectedItems {
 public:
  explicit ExpectedItems(PyObject* items);

  // True if the container is as it was; whoever asks knows that it lives.
  bool same() const;
  int traverse(visitproc visit, void* arg) const { return traverse_all(items_, visit, arg); }

 private:
  PyObject* container_;
  std::vector<Expected> items_;
};

// The bytes of an array on the host, which is kept alive: it refers to nothing.
class ExpectedBytes {
 public:
  explicit ExpectedBytes(pybind11::object array);
  bool same() const;

 private:
  pybind11::object array_;
  std::string bytes_;
};

} // namespace graphcache
