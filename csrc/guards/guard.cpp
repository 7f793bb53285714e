#include "guards/guard.h"

#include <c10/core/StorageImpl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>

namespace py = pybind11;

namespace graphcache {
namespace {

constexpr const char* kContents[] = {"_parameters", "_buffers", "_modules"};
constexpr const char* kHooks[] = {"_forward_hooks", "_forward_pre_hooks"};
// These tables say how hooks are called, and matter only where there are hooks.
constexpr const char* kHookFlags[] = {
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"};

// Returns the address of an object's pointer to its __dict__; the address stays, whatever lies there.
PyObject** dict_slot(PyObject* object) {
  auto** slot = _PyObject_GetDictPtr(object);
  if (slot == nullptr || *slot == nullptr) {
    throw py::type_error(
        "graphcache: an object of type " + std::string(Py_TYPE(object)->tp_name) + " has no __dict__");
  }
  return slot;
}

// A script module keeps its tables elsewhere.
PyObject* table(PyObject* attributes, const char* name) {
  auto* dict = PyDict_GetItemString(attributes, name);
  if (dict == nullptr || !PyDict_Check(dict)) {
    throw py::type_error(
        "graphcache: a module whose " + std::string(name) +
        " is no dict (a ScriptModule's) can't be watched; use it as it was before torch.jit");
  }
  return dict;
}

// A subclass of dict that overrides item access is asked in its own way.
bool is_read_as_dict(PyObject* object) {
  return PyDict_Check(object) &&
      Py_TYPE(object)->tp_as_mapping->mp_subscript == PyDict_Type.tp_as_mapping->mp_subscript;
}

} // namespace

// Modules

Guard::Module::Module(const py::object& module, py::object label_)
    : reference(py::weakref(module)),
      type(Py_TYPE(module.ptr())),
      slot(dict_slot(module.ptr())),
      dict(*slot),
      label(std::move(label_)) {}

bool Guard::Module::same() const {
  auto* const object = reinterpret_cast<PyWeakReference*>(reference.ptr())->wr_object;
  return object != Py_None && *slot == dict && Py_TYPE(object) == type;
}

// Orders

Guard::Order::Order(PyObject* dict_, py::object label_) : dict(dict_), label(std::move(label_)) {
  for (const auto key : py::handle(dict)) {
    keys.push_back(py::reinterpret_borrow<py::object>(key));
  }
}

bool Guard::Order::same() const {
  size_t index = 0;
  for (const auto key : py::handle(dict)) {
    if (index == keys.size() || !key.is(keys[index])) {
      return false;
    }
    ++index;
  }
  return index == keys.size();
}

// Sources

Guard::Source::Source(py::object container_, py::object key_, PyObject* value, py::object label_)
    : container(std::move(container_)), key(std::move(key_)), expected(value, true), label(std::move(label_)) {
  if (is_read_as_dict(container.ptr())) {
    kind = Kind::kDict;
  } else if (PyCell_Check(container.ptr())) {
    kind = Kind::kCell;
  } else if (PyList_CheckExact(container.ptr()) || PyTuple_CheckExact(container.ptr())) {
    kind = PyList_CheckExact(container.ptr()) ? Kind::kList : Kind::kTuple;
    index = key.cast<Py_ssize_t>();
  } else if (Py_IS_TYPE(key.ptr(), &PyMemberDescr_Type)) {
    kind = Kind::kSlot;
    if (auto* weak = PyWeakref_NewRef(container.ptr(), nullptr)) {
      container = py::reinterpret_steal<py::object>(weak);
    } else {
      PyErr_Clear();
    }
  } else if (PyContextVar_CheckExact(container.ptr())) {
    kind = Kind::kContext;
  }
  if (kind != Kind::kOther && kind != Kind::kContext) { // what these give, nobody else need hold
    expected = Expected(value);
  }
}

bool Guard::Source::same() const {
  auto* held = container.ptr();
  switch (kind) {
    case Kind::kDict: {
      auto* found = PyDict_GetItemWithError(held, key.ptr());
      if (found == nullptr) {
        PyErr_Clear();
      }
      return expected.is(found);
    }
    case Kind::kList:
      return index < PyList_GET_SIZE(held) && expected.is(PyList_GET_ITEM(held, index));
    case Kind::kTuple:
      return expected.is(PyTuple_GET_ITEM(held, index));
    case Kind::kCell:
      return expected.is(PyCell_GET(held));
    case Kind::kSlot:
    case Kind::kContext:
    case Kind::kOther:
      break;
  }
  PyObject* now = nullptr;
  if (kind == Kind::kContext) {
    PyContextVar_Get(held, nullptr, &now);
  } else if (kind == Kind::kSlot) {
    held = PyWeakref_CheckRefExact(held) ? reinterpret_cast<PyWeakReference*>(held)->wr_object : held;
    if (held == Py_None) {
      return false;
    }
    now = PyMemberDescr_Type.tp_descr_get(key.ptr(), held, nullptr);
  } else {
    now = PyObject_GetItem(held, key.ptr());
  }
  const auto found = py::reinterpret_steal<py::object>(now);
  if (!found) {
    PyErr_Clear();
  }
  return expected.is(found.ptr());
}

// The tensors in a list or in slots live as long as that, which is held here.
bool Guard::Source::is_gone() const {
  const bool is_held = kind == Kind::kList || (kind == Kind::kSlot && !PyWeakref_CheckRefExact(container.ptr()));
  return expected.is_gone() || (is_held && expected.is_weak_tensor());
}

int Guard::Source::traverse(visitproc visit, void* arg) const {
  Py_VISIT(container.ptr());
  Py_VISIT(key.ptr());
  return expected.traverse(visit, arg);
}

// Addresses

namespace {

// The storage of a Python tensor.
c10::weak_intrusive_ptr<c10::StorageImpl> storage_of(PyObject* object) {
  if (!THPVariable_Check(object)) {
    throw py::type_error("graphcache: expected a torch.Tensor, got " + std::string(Py_TYPE(object)->tp_name));
  }
  const auto& tensor = THPVariable_Unpack(object);
  TORCH_CHECK_TYPE(
      tensor.has_storage(), "graphcache: a tensor of layout ", tensor.layout(), " has no storage");
  return c10::weak_intrusive_ptr<c10::StorageImpl>(tensor.storage().getWeakStorageImpl());
}

} // namespace

Guard::Address::Address(PyObject* object_, py::object label_, std::vector<int64_t>& all_dims)
    : object(object_), known(storage_of(object)), label(std::move(label_)) {
  const auto& tensor = THPVariable_Unpack(object);
  storage = tensor.storage().unsafeGetStorageImpl();
  data = storage->data();
  offset = tensor.storage_offset();
  numel = tensor.numel();
  dims = static_cast<uint32_t>(tensor.dim());
  keys = tensor.key_set().raw_repr();
  dtype = tensor.dtype();
  grad = tensor.requires_grad();
  all_dims.insert(all_dims.end(), tensor.sizes().begin(), tensor.sizes().end());
  all_dims.insert(all_dims.end(), tensor.strides().begin(), tensor.strides().end());
}

bool Guard::Address::same(const int64_t* expected) const {
  const auto* impl = THPVariable_Unpack(object).unsafeGetTensorImpl();
  const auto strides = impl->strides();
  bool same = impl->unsafe_storage().unsafeGetStorageImpl() == storage &&
      impl->storage_offset() == offset && impl->numel() == numel &&
      impl->key_set().raw_repr() == keys && impl->dtype() == dtype && strides.size() == dims &&
      storage->data() == data;
  for (uint32_t dim = 0; same && dim < dims; ++dim) {
    same = strides[dim] == expected[dims + dim];
  }
  if (same && dims > 1) { // of one dimension, the number of elements is the size
    const auto sizes = impl->sizes();
    for (uint32_t dim = 0; same && dim < dims; ++dim) {
      same = sizes[dim] == expected[dim];
    }
  }
  return same;
}

bool Guard::Address::is_gone() const {
  const auto now = known.lock();
  return !now || now->data() != data;
}

bool Guard::Address::requires_grad() const {
  return THPVariable_Unpack(object).requires_grad();
}

// All of them. What is added is made before it is put into place: the cycle collector may come meanwhile.

Guard::Guard(py::object names, bool grads) : names_(std::move(names)), grads_(grads) {}

void Guard::add_module(const py::object& module, py::object label, bool is_root) {
  Module added(module, label);
  add_table(added.dict, label, names_);
  for (const auto* name : kContents) {
    add_table(table(added.dict, name), label, py::none());
  }
  if (!is_root) {
    add_hooks(added);
  }
  modules_.push_back(std::move(added));
}

void Guard::add_hooks(const Module& module) {
  bool any = false;
  for (const auto* name : kHooks) {
    auto* hooks = table(module.dict, name);
    const py::object label = py::str("{}.{}").format(module.label, name);
    add_table(hooks, label, py::none(), /*is_mapping=*/true);
    any = any || PyDict_GET_SIZE(hooks) != 0;
    if (PyDict_GET_SIZE(hooks) > 1) {
      orders_.push_back(Order(hooks, label));
    }
  }
  for (const auto* name : kHookFlags) {
    if (any) {
      add_table(table(module.dict, name), py::str("{}.{}").format(module.label, name), py::none(), /*is_mapping=*/true);
    }
  }
}

void Guard::add_object(const py::object& object, py::object label) {
  Module added(object, std::move(label));
  add_table(added.dict, added.label, names_);
  modules_.push_back(std::move(added));
}

void Guard::add_dict(const py::dict& dict, py::object label, bool named, bool held) {
  dict_watcher_.add(dict.ptr()); // first: what changes from here on is noticed
  ExpectedDict added(dict.ptr(), named ? names_ : py::none(), held, free_);
  tables_.push_back(Table{std::move(added), std::move(label), !named});
}

void Guard::free(const py::object& container, py::object key) {
  if (PyDict_Check(container.ptr())) {
    dict_watcher_.ignore(container.ptr(), key.ptr());
    scopes_.ignore(container.ptr(), key.ptr());
  }
  free_.add(container.ptr(), std::move(key));
}

void Guard::add_table(PyObject* dict, py::object label, const py::object& names, bool is_mapping) {
  dict_watcher_.add(dict);
  tables_.push_back(Table{ExpectedDict(dict, names, /*held=*/true, free_), std::move(label), is_mapping});
}

void Guard::add_items(const py::object& items, py::object label) {
  if (!PyList_Check(items.ptr()) && !PyAnySet_Check(items.ptr())) {
    throw py::type_error("graphcache: expected a list or a set");
  }
  lists_.push_back(Items{ExpectedItems(items.ptr(), free_), std::move(label)});
}

void Guard::pin(const py::object& list) {
  pinned_.insert(list.ptr());
}

void Guard::add_bytes(py::object array, py::object label) {
  buffers_.push_back(Bytes{ExpectedBytes(std::move(array)), std::move(label)});
}

void Guard::add_reference(py::object reference, py::object label) {
  if (!PyWeakref_Check(reference.ptr())) {
    throw py::type_error("graphcache: expected a weak reference or a weak proxy");
  }
  auto* const referent = reinterpret_cast<PyWeakReference*>(reference.ptr())->wr_object;
  references_.push_back(Reference{std::move(reference), referent, std::move(label)});
}

void Guard::add_source(py::object container, py::object key, const py::object& value, py::object label) {
  add(Source(std::move(container), std::move(key), value.ptr(), std::move(label)));
}

void Guard::add_absence(py::object container, py::object key, py::object label) {
  add(Source(std::move(container), std::move(key), nullptr, std::move(label)));
}

void Guard::add(Source source) {
  if (source.kind == Kind::kDict) {
    scopes_.add_once(source.container.ptr());
    dict_sources_.push_back(std::move(source));
  } else {
    sources_.push_back(std::move(source));
  }
}

void Guard::add_tensor(const py::object& tensor, py::object label) {
  addresses_.push_back(Address(tensor.ptr(), std::move(label), dims_));
}

// Sources first: they keep their containers alive, which may hold what is compared after them.
Guard::Failure Guard::first_failure(bool grad) {
  if (never_) {
    return {never_.ptr()};
  }
  if (!scopes_.clean()) {
    if (auto* label = first_changed(dict_sources_)) {
      return {label};
    }
    scopes_.rearm();
  }
  auto* label = first_changed(sources_);
  if (label == nullptr) {
    label = first_changed(references_);
  }
  if (label == nullptr) {
    label = first_changed(modules_);
  }
  if (label == nullptr && !dict_watcher_.clean()) {
    if (const auto failure = changed_table(); failure.label != nullptr) {
      return failure;
    }
  }
  if (label == nullptr) {
    label = first_changed(orders_);
  }
  if (label == nullptr) {
    label = first_changed(lists_);
  }
  if (label == nullptr) {
    label = first_changed(buffers_);
  }
  if (label == nullptr) {
    label = changed_address(grad);
  }
  return {label == nullptr ? effects_.first_unmet() : label};
}

template <typename Checks>
PyObject* Guard::first_changed(const Checks& checks) {
  for (const auto& check : checks) {
    if (!check.same()) {
      return check.label.ptr();
    }
  }
  return nullptr;
}

// Lists that others with the same items took the place of, as a setter may make one at each call. All places of
// a list have to have the same one now, and that has no other place: so no `is` can tell the difference.
class Guard::ReplacedLists {
 public:
  explicit ReplacedLists(Guard& guard) : guard_(guard) {}

  // Returns true if `found` does for what was expected in its place.
  bool take(Expected& expected, PyObject* found) {
    if (!PyList_CheckExact(found)) {
      return false;
    }
    if (lists_.empty()) {
      for (auto& items : guard_.lists_) {
        if (guard_.pinned_.count(items.container()) == 0) {
          lists_.emplace(items.container(), List{&items});
        }
      }
    }
    const auto known = lists_.find(expected.address());
    if (known == lists_.end() || guard_.pinned_.count(found) != 0) {
      return false;
    }
    auto& list = known->second;
    if (list.now == nullptr && taken_.insert(found).second && list.items->has_same(found)) {
      list.now = found;
    }
    list.places.push_back(&expected);
    return list.now == found;
  }

  // Expects them from here on; returns the label of a list that is still in other places, or null.
  PyObject* apply() {
    if (!lists_.empty() && !std::exchange(guard_.places_are_counted_, true)) {
      for (const auto& table : guard_.tables_) {
        table.each_value([&](const Expected& value) {
          if (const auto known = lists_.find(value.address()); known != lists_.end()) {
            ++known->second.items->places;
          }
        });
      }
    }
    for (const auto& [before, list] : lists_) {
      const auto other = lists_.find(list.now);
      const bool is_shared = other != lists_.end() && other->second.now == nullptr;
      if (list.now != nullptr && (is_shared || list.places.size() != list.items->places)) {
        return list.items->label.ptr();
      }
    }
    for (const auto& [before, list] : lists_) {
      if (list.now != nullptr) {
        list.items->replace(list.now);
      }
      for (auto* expected : list.places) {
        expected->replace(list.now);
      }
    }
    return nullptr;
  }

 private:
  struct List {
    Items* items;
    PyObject* now = nullptr;
    std::vector<Expected*> places = {};
  };

  Guard& guard_;
  std::unordered_map<const PyObject*, List> lists_; // by the list that was there
  std::unordered_set<PyObject*> taken_;
};

// Some dict changed, but perhaps back to what it was, as by eval() on what is in eval mode already.
Guard::Failure Guard::changed_table() {
  ReplacedLists replaced(*this);
  const auto take = [&](Expected& expected, PyObject* found) { return replaced.take(expected, found); };
  for (size_t index = 0; index < tables_.size(); ++index) {
    auto& table = tables_[index];
    if (!dict_watcher_.is_alive(index)) {
      return {table.label.ptr()};
    }
    if (dict_watcher_.has_changed(index) && table.changed(take)) {
      return {table.label.ptr(), &table};
    }
  }
  if (auto* label = replaced.apply()) {
    return {label};
  }
  dict_watcher_.rearm();
  return {};
}

PyObject* Guard::changed_address(bool grad) const {
  const auto* address = addresses_.data();
  const auto* const end = address + addresses_.size();
  const auto* dims = dims_.data();
  try {
    for (; address != end; dims += 2 * address->dims, ++address) {
      if (!address->same(dims) || (grad && address->requires_grad()) ||
          (grads_ && address->requires_grad() != address->grad)) {
        break;
      }
    }
  } catch (const c10::Error&) { // expired
  }
  return address == end ? nullptr : address->label.ptr();
}

py::object Guard::explain(bool grad) {
  const auto failure = first_failure(grad);
  if (failure.label == nullptr) {
    return py::none();
  }
  const auto label = py::reinterpret_borrow<py::object>(failure.label);
  const auto key = failure.table == nullptr ? std::nullopt : failure.table->changed();
  if (!key || !*key) {
    return label;
  }
  return py::str(failure.table->is_mapping ? "{}[{!r}]" : "{}.{}").format(label, *key);
}

bool Guard::is_gone() const {
  return never_ || any_gone(modules_) || any_gone(tables_) || any_gone(lists_) ||
      any_gone(references_) || any_gone(dict_sources_) || any_gone(sources_) || any_gone(addresses_);
}

int Guard::traverse(visitproc visit, void* arg) const {
  int stop = traverse_all(tables_, visit, arg);
  stop = stop != 0 ? stop : traverse_all(lists_, visit, arg);
  stop = stop != 0 ? stop : traverse_all(dict_sources_, visit, arg);
  stop = stop != 0 ? stop : traverse_all(sources_, visit, arg);
  stop = stop != 0 ? stop : effects_.traverse(visit, arg);
  for (const auto& held : references_) { // with a callback
    stop = stop != 0 ? stop : visit(held.reference.ptr(), arg);
  }
  for (const auto& held : kept_) {
    stop = stop != 0 ? stop : visit(held.ptr(), arg);
  }
  return stop;
}

void Guard::clear() {
  never_ = py::str("something that the collector freed");
  // Moved out first: what dies here may run code that asks this guard.
  const auto modules = std::move(modules_);
  const auto tables = std::move(tables_);
  const auto lists = std::move(lists_);
  const auto dict_sources = std::move(dict_sources_);
  const auto sources = std::move(sources_);
  const auto kept = std::move(kept_);
  const auto effects = std::move(effects_);
  const auto references = std::move(references_);
}

} // namespace graphcache
