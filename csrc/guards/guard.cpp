#include "guards/guard.h"

#include <c10/core/StorageImpl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <string>
#include <utility>

namespace py = pybind11;

namespace graphcache {
namespace {

constexpr const char* kContents[] = {"_parameters", "_buffers", "_modules"};
constexpr const char* kHooks[] = {"_forward_hooks", "_forward_pre_hooks"};

// Where an object keeps the pointer to its __dict__; the place stays, whatever lies there.
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

Guard::Module::Module(const py::object& module)
    : reference(py::weakref(module)),
      type(Py_TYPE(module.ptr())),
      slot(dict_slot(module.ptr())),
      dict(*slot) {}

bool Guard::Module::is_there() const {
  auto* const object = reinterpret_cast<PyWeakReference*>(reference.ptr())->wr_object;
  return object != Py_None && *slot == dict && Py_TYPE(object) == type;
}

void Guard::watch(const Module& module, bool is_root, const py::object& names, size_t index) {
  const Owner owner{"module", index};
  watch(module.dict, names, owner);
  for (const auto* name : kContents) {
    watch(table(module.dict, name), py::none(), owner);
  }
  if (is_root) {
    return;
  }
  for (const auto* name : kHooks) {
    auto* hooks = table(module.dict, name);
    watch(hooks, py::none(), owner);
    never_ = never_ || PyDict_GET_SIZE(hooks) != 0;
  }
}

void Guard::watch(PyObject* dict, const py::object& names, Owner owner) {
  dict_watcher_.add(dict); // first: what changes from here on is noticed
  tables_.emplace_back(dict, names);
  owners_.push_back(owner);
}

// Places

Guard::Source::Source(const py::tuple& source)
    : kind(Kind::kOther),
      index(0),
      container(source[0]),
      key(source[1]),
      expected(PyTuple_GET_SIZE(source.ptr()) > 2 ? PyTuple_GET_ITEM(source.ptr(), 2) : nullptr) {
  if (is_read_as_dict(container.ptr())) {
    kind = Kind::kDict;
  } else if (PyCell_Check(container.ptr())) {
    kind = Kind::kCell;
  } else if (PyList_CheckExact(container.ptr()) || PyTuple_CheckExact(container.ptr())) {
    kind = PyList_CheckExact(container.ptr()) ? Kind::kList : Kind::kTuple;
    index = key.cast<Py_ssize_t>();
  } else if (Py_IS_TYPE(key.ptr(), &PyMemberDescr_Type)) {
    kind = Kind::kSlot;
  } else if (PyContextVar_CheckExact(container.ptr())) {
    kind = Kind::kContext;
  }
}

bool Guard::Source::holds() const {
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

// Addresses

Guard::Address::Address(py::object object_, std::vector<int64_t>& all_strides)
    : object(std::move(object_)) {
  if (!THPVariable_Check(object.ptr())) {
    throw py::type_error(
        "graphcache: expected a torch.Tensor, got " + std::string(Py_TYPE(object.ptr())->tp_name));
  }
  const auto& tensor = THPVariable_Unpack(object.ptr());
  TORCH_CHECK_TYPE(
      tensor.has_storage(), "graphcache: a tensor of layout ", tensor.layout(), " has no storage");
  storage = tensor.storage().unsafeGetStorageImpl();
  data = storage->data();
  offset = tensor.storage_offset();
  numel = tensor.numel();
  dims = tensor.strides().size();
  grad = tensor.requires_grad();
  all_strides.insert(all_strides.end(), tensor.strides().begin(), tensor.strides().end());
}

// Strides and the number of elements stand for the layout: all of the sizes would double the time.
bool Guard::Address::holds(const int64_t* strides) const {
  const auto* impl = THPVariable_Unpack(object.ptr()).unsafeGetTensorImpl();
  const auto now = impl->strides();
  bool same = impl->unsafe_storage().unsafeGetStorageImpl() == storage &&
      impl->storage_offset() == offset && impl->numel() == numel && now.size() == dims &&
      storage->data() == data;
  for (size_t dim = 0; same && dim < dims; ++dim) {
    same = now[dim] == strides[dim];
  }
  return same;
}

bool Guard::Address::requires_grad() const {
  return THPVariable_Unpack(object.ptr()).requires_grad();
}

// All of them

Guard::Guard(const Expectations& expectations) {
  for (const auto& module : expectations.modules) {
    const auto index = modules_.size();
    watch(modules_.emplace_back(module), module.is(expectations.root), expectations.names, index);
  }
  for (const auto& object : expectations.objects) {
    const auto index = modules_.size() - expectations.modules.size();
    watch(modules_.emplace_back(object).dict, expectations.names, {"object", index});
  }
  for (size_t index = 0; index < expectations.dicts.size(); ++index) {
    const auto& [dict, filtered] = expectations.dicts[index];
    watch(
        py::cast<py::dict>(dict).ptr(),
        filtered ? expectations.names : py::object(py::none()),
        {"dict", index});
  }
  for (const auto& list : expectations.lists) {
    if (!PyList_Check(list.ptr()) && !PyAnySet_Check(list.ptr())) {
      throw py::type_error("graphcache: lists are lists or sets");
    }
    lists_.emplace_back(list.ptr());
  }
  for (const auto& buffer : expectations.buffers) {
    buffers_.emplace_back(buffer);
  }
  for (size_t index = 0; index < expectations.sources.size(); ++index) {
    Source source(py::cast<py::tuple>(expectations.sources[index]));
    if (source.kind == Kind::kDict) {
      scopes_.add(source.container.ptr());
      dict_sources_.push_back(std::move(source));
      source_numbers_.push_back(index);
    } else {
      sources_.push_back(std::move(source));
    }
  }
  for (size_t index = 0; index < expectations.sources.size(); ++index) {
    if (!is_read_as_dict(PyTuple_GET_ITEM(expectations.sources[index].ptr(), 0))) {
      source_numbers_.push_back(index);
    }
  }
  grads_ = expectations.grads;
  for (const auto& tensor : expectations.tensors) {
    addresses_.emplace_back(tensor, strides_);
  }
}

// Places first: they keep what they look at alive, and what is watched after them may hang on them.
bool Guard::check(bool grad) {
  return !never_ && check_sources() && check_modules() && check_addresses(grad);
}

bool Guard::check_modules() {
  for (const auto& module : modules_) {
    if (!module.is_there()) {
      return false;
    }
  }
  if (!dict_watcher_.clean()) {
    // Changed, but perhaps back to what it was, as by eval() on what is in eval mode already.
    if (dict_watcher_.lost() ||
        !std::all_of(tables_.begin(), tables_.end(), [](const auto& table) { return table.same(); })) {
      return false;
    }
    dict_watcher_.rearm();
  }
  // After what holds them.
  const auto same = [](const auto& items) { return items.same(); };
  return std::all_of(lists_.begin(), lists_.end(), same) &&
      std::all_of(buffers_.begin(), buffers_.end(), same);
}

bool Guard::check_sources() {
  const auto holds = [](const auto& source) { return source.holds(); };
  if (!scopes_.clean()) {
    if (!std::all_of(dict_sources_.begin(), dict_sources_.end(), holds)) {
      return false;
    }
    scopes_.rearm();
  }
  return std::all_of(sources_.begin(), sources_.end(), holds);
}

py::object Guard::explain(bool grad) {
  const auto found = [](const char* kind, size_t index, py::object key = py::none()) -> py::object {
    return py::make_tuple(kind, index, key ? std::move(key) : py::object(py::none()));
  };
  size_t number = 0;
  for (const auto* sources : {&dict_sources_, &sources_}) {
    for (const auto& source : *sources) {
      if (!source.holds()) {
        return found("place", source_numbers_[number]);
      }
      ++number;
    }
  }
  for (size_t index = 0; index < modules_.size(); ++index) {
    if (!modules_[index].is_there()) {
      return found("gone", index);
    }
  }
  if (!dict_watcher_.lost()) {
    for (size_t index = 0; index < tables_.size(); ++index) {
      if (auto key = tables_[index].changed()) {
        return found(owners_[index].first, owners_[index].second, std::move(*key));
      }
    }
    for (size_t index = 0; index < lists_.size(); ++index) {
      if (!lists_[index].same()) {
        return found("list", index);
      }
    }
  }
  for (size_t index = 0; index < buffers_.size(); ++index) {
    if (!buffers_[index].same()) {
      return found("buffer", index);
    }
  }
  const auto* strides = strides_.data();
  for (size_t index = 0; index < addresses_.size(); ++index) {
    if (!holds(addresses_[index], strides, grad)) {
      return found("tensor", index);
    }
    strides += addresses_[index].dims;
  }
  return check(grad) ? py::object(py::none()) : found("other", 0);
}

bool Guard::holds(const Address& address, const int64_t* strides, bool grad) const {
  return address.holds(strides) && !(grad && address.requires_grad()) &&
      !(grads_ && address.requires_grad() != address.grad);
}

bool Guard::check_addresses(bool grad) const {
  try {
    const auto* strides = strides_.data();
    for (const auto& address : addresses_) {
      if (!holds(address, strides, grad)) {
        return false;
      }
      strides += address.dims;
    }
    return true;
  } catch (const c10::Error&) {
    return false; // expired
  }
}

int Guard::traverse(visitproc visit, void* arg) const {
  for (const auto& table : tables_) {
    if (const int stop = table.traverse(visit, arg)) {
      return stop;
    }
  }
  for (const auto& list : lists_) {
    if (const int stop = list.traverse(visit, arg)) {
      return stop;
    }
  }
  for (const auto* sources : {&dict_sources_, &sources_}) {
    for (const auto& source : *sources) {
      Py_VISIT(source.container.ptr());
      Py_VISIT(source.key.ptr());
      if (const int stop = source.expected.traverse(visit, arg)) {
        return stop;
      }
    }
  }
  for (const auto& address : addresses_) {
    Py_VISIT(address.object.ptr());
  }
  return 0;
}

void Guard::clear() {
  never_ = true;
  // Moved out first: what dies here may run code that asks this guard.
  const auto modules = std::move(modules_);
  const auto tables = std::move(tables_);
  const auto lists = std::move(lists_);
  const auto dict_places = std::move(dict_sources_);
  const auto sources = std::move(sources_);
  const auto addresses = std::move(addresses_);
}

} // namespace graphcache
