// Objects and dicts as they were once, to be recognised later by address.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace graphcache {

// One object. Its address stands for it only while it lives, so plain values are kept alive. Tensors are not: they
// may be large, and `Guard::add_tensor` compares the memory of whatever tensor is at that address.
// Other objects are known by a weak reference, since they may refer to the owner of this. Lists, dicts and
// sets allow none: they are known by their address and type, as their contents are compared. All else that
// allows none (tuples, slices, properties) is known by its type and by what it refers to.
class Expected {
 public:
  // null: nothing is to be there. `keep`: keep a tensor alive, too. `depth`: how deep objects are known by what they
  // refer to.
  explicit Expected(PyObject* object, bool keep = false, int depth = 4);

  // Whatever is there: another check looks at that.
  static Expected anything();

  // The same object; or, of numbers, texts and tuples of them, one of the same type and value.
  bool is(PyObject* object) const;
  // True if an object that it needs was freed, so that it will never be found again. Also where it keeps a tensor
  // alive itself, so that nobody can tell.
  bool is_gone() const;
  // A tensor that is not kept alive.
  bool is_weak_tensor() const { return is_weak_tensor_; }

  const PyObject* address() const { return address_; }
  // Expects another list, where a list is known by its address.
  void replace(PyObject* list) { address_ = list; }
  int traverse(visitproc visit, void* arg) const;

 private:
  bool refers_to_items() const;

  PyObject* address_;
  bool any_ = false;
  pybind11::object object_; // the object itself, a weak reference to it, or nothing
  PyTypeObject* type_ = nullptr; // of one that is known by its address, or its items; never read
  bool is_weak_tensor_ = false;
  bool by_items_ = false;
  std::vector<Expected> items_; // what it refers to
};

// Numbers, texts and tuples of them, of the same type and value.
bool is_equal(PyObject* a, PyObject* b);

// Places that are left to another check, as a counter is: each a container and its key or index.
class FreeSources {
 public:
  void add(PyObject* container, pybind11::object key) { places_.emplace_back(container, std::move(key)); }
  bool has(PyObject* container, PyObject* key) const;
  bool has(PyObject* container, Py_ssize_t index) const;

 private:
  std::vector<std::pair<PyObject*, pybind11::object>> places_; // compared only while all containers live
};

// True if the object of a weak reference still lives.
inline bool is_alive(PyObject* reference) {
  return reinterpret_cast<PyWeakReference*>(reference)->wr_object != Py_None;
}

inline bool Expected::is(PyObject* object) const {
  if (object != address_) {
    return any_ ||
        (object != nullptr && address_ != nullptr && object_.ptr() == address_ && is_equal(object, address_));
  }
  if (object_) {
    return object_.ptr() == address_ || is_alive(object_.ptr());
  }
  return object == nullptr || (Py_TYPE(object) == type_ && (!by_items_ || refers_to_items()));
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

template <typename Things>
bool any_gone(const Things& things) {
  return std::any_of(things.begin(), things.end(), [](const auto& thing) { return thing.is_gone(); });
}

// The keys and values of one dict, in their order.
class ExpectedDict {
 public:
  // `names`: a frozenset of the keys that count, besides those that are no strings; None: all do. A dict
  // that is not `held` is kept alive before Python 3.12, where nobody can ask whether it lives.
  ExpectedDict(PyObject* dict, pybind11::object names, bool held, const FreeSources& free);

  // True if the dict is as it was; whoever asks knows that it lives.
  bool same() const { return !changed().has_value(); }
  // The first key that is not as it was, or a null one where something came on top.
  std::optional<pybind11::object> changed() const {
    return const_cast<ExpectedDict*>(this)->changed([](Expected&, PyObject*) { return false; });
  }
  // Likewise; `takes` is asked for each value that is another one, and returns true if that does for it.
  template <typename Takes>
  std::optional<pybind11::object> changed(const Takes& takes);
  template <typename Visit>
  void each_value(const Visit& visit) const {
    for (const auto& entry : entries_) {
      visit(entry.second);
    }
  }
  bool is_gone() const;
  int traverse(visitproc visit, void* arg) const;

 private:
  bool counts(PyObject* key) const;

  PyObject* dict_;
  pybind11::object kept_; // the dict itself, or nothing
  pybind11::object names_;
  std::vector<std::pair<Expected, Expected>> entries_;
};

template <typename Takes>
std::optional<pybind11::object> ExpectedDict::changed(const Takes& takes) {
  if (!PyDict_Check(dict_)) {
    return pybind11::object();
  }
  auto expected = entries_.begin();
  Py_ssize_t position = 0;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  while (PyDict_Next(dict_, &position, &key, &value) != 0) {
    if (expected != entries_.end() && expected->first.is(key)) { // it counted at first, so it does now
      if (!expected->second.is(value) && !takes(expected->second, value)) {
        return pybind11::reinterpret_borrow<pybind11::object>(key);
      }
      ++expected;
    } else if (counts(key)) {
      return pybind11::reinterpret_borrow<pybind11::object>(key);
    }
  }
  return expected == entries_.end() ? std::nullopt : std::make_optional(pybind11::object());
}

// The items of one list or set.
class ExpectedItems {
 public:
  ExpectedItems(PyObject* items, const FreeSources& free);

  // True if the container is as it was; whoever asks knows that it lives.
  bool same() const { return has_same(container_); }
  bool has_same(PyObject* container) const;
  PyObject* container() const { return container_; }
  void replace(PyObject* container) { container_ = container; }
  bool is_gone() const { return any_gone(items_); }
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
