// Effects of a forward on Python values, which each replay repeats: counters, constants, tensors that it made.
#pragma once

#include "tensors/python_tensor.h"

#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace graphcache {

class StaticObject;

// A place that holds a Python value: an item of a dict or a list, a slot, or a closure cell.
class Location {
 public:
  // `borrowed`: a guard is asked before each use whether the container lives; it is not kept alive.
  Location(const pybind11::object& container, pybind11::object key, bool borrowed);

  // The container; null where it is gone.
  pybind11::object container() const;
  // The value in a container of `container()`; null where there is none.
  pybind11::object get(const pybind11::object& container) const;
  void set(const pybind11::object& container, PyObject* value) const;
  int traverse(visitproc visit, void* arg) const;

 private:
  PyObject* borrowed_ = nullptr;
  pybind11::object held_; // the container, or a weak reference to it
  pybind11::object key_;
};

// One place that a forward set or counted at, what it has to hold before, and what is stored there.
struct Effect {
  enum Store : char { Nothing, Sum, Constant, Output };

  std::shared_ptr<Location> place; // null: that number `index` of the counters of `object`
  std::shared_ptr<StaticObject> object;
  size_t index = 0;
  pybind11::object type; // the exact type of the value before; None for any
  int64_t low = 0; // bounds of an int, the upper one excluded; both 0 for any value
  int64_t high = 0;
  Store store = Nothing;
  size_t base = 0; // a sum: the effect whose int `amount` is added to
  int64_t amount = 0;
  pybind11::object constant;
  size_t output = 0; // among the further results of the graph
  pybind11::object label;

  const Location* where() const;
};

// Made, asked and destroyed with the GIL held.
class Effects {
 public:
  // The places of a call, found before its launch.
  struct Found {
    c10::SmallVector<pybind11::object, 8> containers;
    c10::SmallVector<int64_t, 8> ints;
    std::vector<std::pair<size_t, pybind11::object>> taken; // tensors, and out of which place
  };

  void add(Effect effect) { effects_.push_back(std::move(effect)); }
  bool empty() const { return effects_.empty(); }
  bool has_outputs() const;
  // The label of the first place that does not hold what it has to; null where all do. Only after a guard of the
  // containers was asked.
  PyObject* first_unmet() const;

  Found find() const;
  // Takes tensors out of the places of which outputs will be stored, where nobody else holds them and `may` agrees.
  template <typename May>
  void take(Found& found, May may) const {
    for (size_t index = 0; index < effects_.size(); ++index) {
      const auto* const place = effects_[index].store == Effect::Output ? effects_[index].where() : nullptr;
      auto value = place == nullptr ? pybind11::object() : place->get(found.containers[index]);
      if (value && is_exact_tensor(value.ptr()) && Py_REFCNT(value.ptr()) == 2 && may(tensor_in(value.ptr()))) {
        place->set(found.containers[index], Py_None);
        found.taken.emplace_back(index, std::move(value));
      }
    }
  }
  // Puts them back.
  template <typename Tell>
  void put_back(const Found& found, Tell tell) const {
    for (const auto& [index, value] : found.taken) {
      tell(tensor_in(value.ptr()));
      effects_[index].where()->set(found.containers[index], value.ptr());
    }
  }
  int traverse(visitproc visit, void* arg) const;

  // Stores sums and constants.
  void store(const Found& found) const;
  // Stores the further results of the graph.
  void store_outputs(const Found& found, const pybind11::tuple& outputs) const;

 private:
  std::vector<Effect> effects_;
};

} // namespace graphcache
