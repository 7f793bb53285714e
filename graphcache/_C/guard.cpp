#include "guard.h"

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
        "graphcache: a module whose " + std::string(name) + " is no dict can't be watched");
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
    : reference(py::weakref(module)), slot(dict_slot(module.ptr())), dict(*slot) {}

bool Guard::Module::is_there() const {
  return is_alive(reference.ptr()) && *slot == dict;
}

void Guard::watch(const Module& module, bool is_root) {
  watch(module.dict);
  for (const auto* name : kContents) {
    watch(table(module.dict, name));
  }
  if (is_root) {
    return;
  }
  for (const auto* name : kHooks) {
    auto* hooks = table(module.dict, name);
    watch(hooks);
    never_ = never_ || PyDict_GET_SIZE(hooks) != 0;
  }
}

void Guard::watch(PyObject* dict) {
  watched_.add(dict); // first: what changes from here on is noticed
  tables_.emplace_back(dict);
}

// Places

Guard::Place::Place(const py::tuple& place)
    : kind(Kind::kOther),
      index(0),
      container(place[0]),
      key(place[1]),
      expected(PyTuple_GET_ITEM(place.ptr(), 2)) {
  if (is_read_as_dict(container.ptr())) {
    kind = Kind::kDict;
  } else if (PyCell_Check(container.ptr())) {
    kind = Kind::kCell;
  } else if (PyList_CheckExact(container.ptr()) || PyTuple_CheckExact(container.ptr())) {
    kind = PyList_CheckExact(container.ptr()) ? Kind::kList : Kind::kTuple;
    index = key.cast<Py_ssize_t>();
  }
}

bool Guard::Place::holds() const {
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
    case Kind::kOther:
      break;
  }
  const auto found = py::reinterpret_steal<py::object>(PyObject_GetItem(held, key.ptr()));
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

Guard::Guard(
    const Objects& modules,
    const py::object& root,
    const Objects& dicts,
    const Objects& places,
    const Objects& tensors)
    : dicts_(dicts) {
  for (const auto& module : modules) {
    watch(modules_.emplace_back(module), module.is(root));
  }
  for (const auto& dict : dicts) {
    watch(py::cast<py::dict>(dict).ptr());
  }
  for (const auto& place : places) {
    places_.emplace_back(py::cast<py::tuple>(place));
  }
  for (const auto& tensor : tensors) {
    addresses_.emplace_back(tensor, strides_);
  }
}

bool Guard::hold(bool grad) {
  return !never_ && modules_hold() && places_hold() && addresses_hold(grad);
}

bool Guard::modules_hold() {
  for (const auto& module : modules_) {
    if (!module.is_there()) {
      return false;
    }
  }
  if (watched_.clean()) {
    return true;
  }
  // Changed, but perhaps back to what it was, as by eval() on what is in eval mode already.
  if (watched_.lost() ||
      !std::all_of(tables_.begin(), tables_.end(), [](const auto& table) { return table.same(); })) {
    return false;
  }
  watched_.rearm();
  return true;
}

bool Guard::places_hold() const {
  return std::all_of(
      places_.begin(), places_.end(), [](const auto& place) { return place.holds(); });
}

bool Guard::addresses_hold(bool grad) const {
  try {
    const auto* strides = strides_.data();
    for (const auto& address : addresses_) {
      if (!address.holds(strides) || (grad && address.requires_grad())) {
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
  for (const auto& dict : dicts_) {
    Py_VISIT(dict.ptr());
  }
  for (const auto& place : places_) {
    Py_VISIT(place.container.ptr());
    Py_VISIT(place.key.ptr());
    if (const int stop = place.expected.traverse(visit, arg)) {
      return stop;
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
  const auto dicts = std::move(dicts_);
  const auto places = std::move(places_);
  const auto addresses = std::move(addresses_);
}

} // namespace graphcache
