// What the graphs of one signature depend on besides their arguments, compared on every call.
#pragma once

#include "guards/dict_watcher.h"
#include "guards/expected.h"

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

  // `modules`: their parameters, buffers, children and, of their attributes, those in `names` (None:
  // all); of all but `root` also that they have no hooks. `objects`: the same of other objects that have
  // attributes. `dicts` (with a flag: only `names` count) and `lists` must stay as they are; each is held
  // by something that is watched before it. `sources`: (container, key, value) that have to stay so, or
  // (container, key) that have to stay empty; a container may be a context variable, with any key.
  // `tensors` keep their storage, address and layout.
  struct Expectations {
    Objects modules;
    pybind11::object root;
    Objects objects;
    std::vector<std::pair<pybind11::object, bool>> dicts;
    Objects lists; // and sets
    Objects buffers; // arrays on the host that keep their bytes
    Objects sources;
    Objects tensors;
    pybind11::object names;
    bool grads; // whether it counts which of `tensors` require gradients
  };
  explicit Guard(const Expectations& expectations);

  // Tells whether all is as it was; with `grad`, also that nothing requires gradients.
  bool check(bool grad);

  // What is not, for a message: (kind, index among its kind, key or None). None where all is.
  pybind11::object explain(bool grad);

  // For Python's cycle collector, to be called by the only owner; after `clear` nothing holds.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Module {
    explicit Module(const pybind11::object& module);
    bool is_there() const;

    pybind11::object reference;
    PyTypeObject* type;
    PyObject** slot; // where the module keeps its __dict__
    PyObject* dict;
  };

  enum class Kind : char { kDict, kList, kTuple, kCell, kSlot, kContext, kOther };

  struct Source {
    explicit Source(const pybind11::tuple& source);
    bool holds() const;

    Kind kind;
    Py_ssize_t index; // in a list or a tuple
    pybind11::object container;
    pybind11::object key;
    Expected expected;
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
    bool grad;
  };

  // Whose table it is, for `broken`: a kind, and the index among that.
  using Owner = std::pair<const char*, size_t>;

  void watch(const Module& module, bool is_root, const pybind11::object& names, size_t index);
  void watch(PyObject* dict, const pybind11::object& names, Owner owner);
  bool check_modules();
  bool check_sources();
  bool check_addresses(bool grad) const;
  bool holds(const Address& address, const int64_t* strides, bool grad) const;

  std::vector<Module> modules_; // and other objects after them
  std::vector<ExpectedDict> tables_; // those of each module behind its __dict__, which keeps them alive
  std::vector<Owner> owners_; // of each table
  DictGroup dict_watcher_; // the same dicts, in the same order
  std::vector<ExpectedItems> lists_;
  std::vector<ExpectedBytes> buffers_;
  std::vector<Source> dict_sources_; // globals of Python modules: they change often, elsewhere
  DictGroup scopes_; // the containers of these
  std::vector<Source> sources_;
  std::vector<size_t> source_numbers_; // as they were given: those in dicts, then the others
  std::vector<Address> addresses_;
  std::vector<int64_t> strides_; // those of all addresses, one after another
  bool grads_ = false;
  bool never_ = false; // hooked from the start, or cleared
};

} // namespace graphcache
