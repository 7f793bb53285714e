// Guards on all that the graphs of one signature depend on besides their arguments, compared on every call.
#pragma once

#include "guards/dict_watcher.h"
#include "guards/effects.h"
#include "guards/expected.h"

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <unordered_set>
#include <vector>

namespace graphcache {

// Made, asked and destroyed with the GIL held. Modules are known weakly: a child that knows its parent
// must not keep the parent, and with it the guard, alive.
//
// Each `add` takes one thing as it is now, with a label that names it in messages. A dict has to be added
// after the thing that holds it, since the guard compares dicts in that order.
class Guard {
 public:
  // `names`: the attributes that count (None: all); `grads`: tensors have to keep their requires_grad.
  explicit Guard(pybind11::object names, bool grads);

  // The attributes, parameters, buffers, children and class of a module stay; unless it is the root, its
  // hooks stay, too.
  void add_module(const pybind11::object& module, pybind11::object label, bool is_root);
  // The attributes and the class of an object stay.
  void add_object(const pybind11::object& object, pybind11::object label);
  // A dict stays; if `named`, only keys in `names` count. `held`: by something that was added before.
  void add_dict(const pybind11::dict& dict, pybind11::object label, bool named, bool held);
  // A list or set keeps its items.
  void add_items(const pybind11::object& items, pybind11::object label);
  // A list is in a place besides attributes and dicts. One that is not may be replaced by another with its items.
  void pin(const pybind11::object& list);
  // An array on the host keeps its bytes.
  void add_bytes(pybind11::object array, pybind11::object label);
  // A weak reference or proxy refers to the same. It is held, which keeps nothing alive.
  void add_reference(pybind11::object reference, pybind11::object label);
  // `value` stays where `container` has `key`. A container may also be a cell or a context variable, with
  // any key, or an object with slots, with a descriptor as the key.
  void add_source(
      pybind11::object container, pybind11::object key, const pybind11::object& value, pybind11::object label);
  // Nothing comes where `container` has `key`.
  void add_absence(pybind11::object container, pybind11::object key, pybind11::object label);
  // A tensor keeps its storage, address and metadata. It is not kept alive: its source was added, and is
  // compared before. Where no source is compared, the tensor has to be kept.
  void add_tensor(const pybind11::object& tensor, pybind11::object label);
  // Leaves the value at `key` of a container to an effect; before the container is added.
  void free(const pybind11::object& container, pybind11::object key);
  // Adds an effect, whose place has to hold what the effect expects; after the container was added.
  void add_effect(Effect effect) { effects_.add(std::move(effect)); }
  const Effects& effects() const { return effects_; }
  // Keeps an object alive.
  void keep(pybind11::object object) { kept_.push_back(std::move(object)); }

  // True if all is as it was; with `grad`, also that nothing requires gradients.
  bool check(bool grad) { return first_failure(grad).label == nullptr; }

  // The name of the first thing that is not as it was; None where all is.
  pybind11::object explain(bool grad);

  // True if it can never hold again, once it does not: something that it compares was freed. Also where it keeps
  // tensors alive itself, so that nobody can tell.
  bool is_gone() const;

  // For Python's cycle collector, to be called by the only owner; after `clear` no check succeeds.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Table : ExpectedDict {
    pybind11::object label;
    bool is_mapping; // no attributes of something
  };

  struct Failure {
    PyObject* label = nullptr; // null: there is none
    const Table* table = nullptr; // of the dict that changed, if that is known to live
  };

  struct Module {
    Module(const pybind11::object& module, pybind11::object label);
    bool same() const;
    bool is_gone() const { return !is_alive(reference.ptr()); }

    pybind11::object reference;
    PyTypeObject* type;
    PyObject** slot; // where the module keeps its __dict__
    PyObject* dict;
    pybind11::object label;
  };

  // The order of the keys of an OrderedDict, which may change while the dict below it does not.
  struct Order {
    Order(PyObject* dict, pybind11::object label);
    bool same() const;

    PyObject* dict; // of a table that is compared before
    std::vector<pybind11::object> keys; // numbers
    pybind11::object label;
  };

  struct Items : ExpectedItems {
    pybind11::object label;
    size_t places = 0; // in dicts, once they are counted
  };

  struct Reference {
    bool same() const { return reinterpret_cast<PyWeakReference*>(reference.ptr())->wr_object == referent; }
    bool is_gone() const { return referent != Py_None && !is_alive(reference.ptr()); }

    pybind11::object reference;
    PyObject* referent;
    pybind11::object label;
  };

  struct Bytes : ExpectedBytes {
    pybind11::object label;
  };

  enum class Kind : char { kDict, kList, kTuple, kCell, kSlot, kContext, kOther };

  struct Source {
    Source(pybind11::object container, pybind11::object key, PyObject* value, pybind11::object label);
    bool same() const;
    bool is_gone() const;
    int traverse(visitproc visit, void* arg) const;

    Kind kind = Kind::kOther;
    Py_ssize_t index = 0; // in a list or a tuple
    pybind11::object container; // of slots, a weak reference where that can be
    pybind11::object key;
    Expected expected;
    pybind11::object label;
  };

  struct Address {
    Address(PyObject* object, pybind11::object label, std::vector<int64_t>& all_dims);
    bool same(const int64_t* dims) const;
    bool requires_grad() const;
    bool is_gone() const;

    PyObject* object; // not its TensorImpl: torch may swap that, if nobody else holds it
    c10::StorageImpl* storage;
    c10::weak_intrusive_ptr<c10::StorageImpl> known; // the same: no other one gets its address
    const void* data;
    int64_t offset;
    int64_t numel;
    uint64_t keys; // of dispatch: conjugate and negative bits among them
    uint32_t dims;
    caffe2::TypeMeta dtype;
    bool grad;
    pybind11::object label;
  };

  class ReplacedLists;

  void add_hooks(const Module& module);
  void add_table(
      PyObject* dict, pybind11::object label, const pybind11::object& names, bool is_mapping = false);
  void add(Source source);
  Failure first_failure(bool grad);
  Failure changed_table();
  template <typename Checks>
  static PyObject* first_changed(const Checks& checks);
  PyObject* changed_address(bool grad) const;

  pybind11::object names_;
  bool grads_;
  FreeSources free_;
  Effects effects_;
  std::vector<Module> modules_; // and other objects
  std::vector<Table> tables_; // those of each module behind its __dict__, which keeps them alive
  DictGroup dict_watcher_; // the same dicts, in the same order
  std::vector<Order> orders_;
  std::vector<Items> lists_;
  bool places_are_counted_ = false;
  std::unordered_set<PyObject*> pinned_; // of them, known by address: never read
  std::vector<Bytes> buffers_;
  std::vector<Reference> references_;
  std::vector<Source> dict_sources_; // globals of Python modules: they change often, elsewhere
  DictGroup scopes_; // the containers of these
  std::vector<Source> sources_;
  std::vector<Address> addresses_;
  std::vector<pybind11::object> kept_;
  std::vector<int64_t> dims_; // sizes and strides of each address, one after another
  pybind11::object never_; // why no check succeeds any more; null: checks may succeed
};

} // namespace graphcache
