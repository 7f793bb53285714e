// Objects and dicts as they were once, to be recognised later by address.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

namespace graphcache {

// One object. Its address stands for it only while it lives, so tensors and plain values are kept alive.
// Other objects are known by a weak reference, since they may lead back to what owns this; those that
// allow none (lists, dicts) by nothing but their address.
class Noted {
 public:
  explicit Noted(PyObject* object);

  bool is(PyObject* object) const;
  int traverse(visitproc visit, void* arg) const;

 private:
  PyObject* address_;
  pybind11::object keeper_; // the object itself, a weak reference to it, or nothing
};

// Tells whether the object of a weak reference still lives.
inline bool is_alive(PyObject* reference) {
  return reinterpret_cast<PyWeakReference*>(reference)->wr_object != Py_None;
}

inline bool Noted::is(PyObject* object) const {
  return object == address_ &&
      (!keeper_ || keeper_.ptr() == address_ || is_alive(keeper_.ptr()));
}

// The keys and values of one dict, in their order.
class Table {
 public:
  explicit Table(PyObject* dict);

  // Tells whether the dict is as it was; whoever asks knows that it lives.
  bool same() const;
  int traverse(visitproc visit, void* arg) const;

 private:
  PyObject* dict_;
  std::vector<std::pair<Noted, Noted>> entries_;
};

} // namespace graphcache
