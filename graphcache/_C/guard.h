// What the graphs of one signature depend on besides their arguments, compared on every call.
#pragma once

#include "dict_watch.h"
#include "noted.h"

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <vector>

namespace graphcache {

// Made, asked and destroyed with the GIL held. Modules are known weakly: a child that knows its parent
// must not keep the parent, and with it this, alive.
class Guard {
 public:
  using Objects = std::vector<pybind11::object>;

  Guard() = default; // holds always

  // `modules`: all of their attributes, parameters, buffers and children; of all but `root` also that
  // they have no hooks. `dicts` must stay as they are. `places`: (container, key, value) that have to
  // stay so. `tensors` keep their storage, address and layout.
  Guard(
      const Objects& modules,
      const pybind11::object& root,
      const Objects& dicts,
      const Objects& places,
      const Objects& tensors);

  // Tells whether all is as it was; with `grad`, also that nothing requires gradients.
  bool hold(bool grad);

  // For Python's cycle collector, to be called by the only owner; after `clear` nothing holds.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Module {
    explicit Module(const pybind11::object& module);
    bool is_there() const;

    pybind11::object reference;
    PyObject** slot; // where the module keeps its __dict__
    PyObject* dict;
  };

  enum class Kind : char { kDict, kList, kTuple, kCell, kOther };

  struct Place {
    explicit Place(const pybind11::tuple& place);
    bool holds() const;

    Kind kind;
    Py_ssize_t index; // in a list or a tuple
    pybind11::object container;
    pybind11::object key;
    Noted expected;
  };

  struct Address {
    Address(pybind11::object object, std::vector<int64_t>& all_strides);
    bool holds(const int64_t* strides) const;
    bool requires_grad() const;

    pybind11::object object; // not its TensorImpl: torch may swap that, if nobody else holds it
    c10::StorageImpl* storage;
    const void* data;
    int64_t offset;
    int64_t numel;
    size_t dims;
  };

  void watch(const Module& module, bool is_root);
  void watch(PyObject* dict);
  bool modules_hold();
  bool places_hold() const;
  bool addresses_hold(bool grad) const;

  std::vector<Module> modules_;
  std::vector<Table> tables_; // those of each module behind its __dict__, which keeps them alive
  DictGroup watched_; // the same dicts, in the same order
  Objects dicts_; // those of no module
  std::vector<Place> places_;
  std::vector<Address> addresses_;
  std::vector<int64_t> strides_; // those of all addresses, one after another
  bool never_ = false; // hooked from the start, or cleared
};

} // namespace graphcache
