#include "guards/effects.h"

#include "guards/static_object.h"

#include <optional>
#include <utility>

namespace py = pybind11;

namespace graphcache {
namespace {

std::optional<int64_t> exact_int(PyObject* value) {
  if (value == nullptr || !PyLong_CheckExact(value)) {
    return std::nullopt;
  }
  int overflow = 0;
  const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
  return overflow == 0 ? std::make_optional(number) : std::nullopt;
}

} // namespace

Location::Location(const py::object& container, py::object key, bool borrowed) : key_(std::move(key)) {
  if (borrowed) {
    borrowed_ = container.ptr();
    return;
  }
  held_ = container;
  if (Py_IS_TYPE(key_.ptr(), &PyMemberDescr_Type)) { // of an object, which must not be kept alive
    if (auto* weak = PyWeakref_NewRef(container.ptr(), nullptr)) {
      held_ = py::reinterpret_steal<py::object>(weak);
    } else {
      PyErr_Clear();
    }
  }
}

py::object Location::container() const {
  if (borrowed_ != nullptr) {
    return py::reinterpret_borrow<py::object>(borrowed_);
  }
  if (!PyWeakref_CheckRefExact(held_.ptr())) {
    return held_;
  }
  auto* const object = reinterpret_cast<PyWeakReference*>(held_.ptr())->wr_object;
  return object == Py_None ? py::object() : py::reinterpret_borrow<py::object>(object);
}

py::object Location::get(const py::object& container) const {
  auto* const holder = container.ptr();
  PyObject* found = nullptr; // borrowed
  if (holder == nullptr) {
    return {};
  }
  if (PyDict_Check(holder)) {
    found = PyDict_GetItemWithError(holder, key_.ptr());
  } else if (PyList_CheckExact(holder)) {
    const auto index = PyLong_AsSsize_t(key_.ptr());
    found = index < PyList_GET_SIZE(holder) ? PyList_GET_ITEM(holder, index) : nullptr;
  } else if (PyCell_Check(holder)) {
    found = PyCell_GET(holder);
  } else {
    auto value = py::reinterpret_steal<py::object>(PyMemberDescr_Type.tp_descr_get(key_.ptr(), holder, nullptr));
    PyErr_Clear();
    return value;
  }
  PyErr_Clear();
  return py::reinterpret_borrow<py::object>(found);
}

void Location::set(const py::object& container, PyObject* value) const {
  auto* const holder = container.ptr();
  int failed = 0;
  if (holder == nullptr) {
    return; // gone meanwhile: nobody can look
  }
  if (PyDict_Check(holder)) {
    failed = PyDict_SetItem(holder, key_.ptr(), value);
  } else if (PyList_CheckExact(holder)) {
    const auto index = PyLong_AsSsize_t(key_.ptr());
    Py_INCREF(value);
    failed = PyList_SetItem(holder, index, value);
  } else if (PyCell_Check(holder)) {
    failed = PyCell_Set(holder, value);
  } else {
    failed = PyMemberDescr_Type.tp_descr_set(key_.ptr(), holder, value);
  }
  if (failed != 0) {
    throw py::error_already_set();
  }
}

int Location::traverse(visitproc visit, void* arg) const {
  Py_VISIT(held_.ptr());
  return 0;
}

int Effects::traverse(visitproc visit, void* arg) const {
  for (const auto& effect : effects_) {
    if (const int stop = effect.place == nullptr ? 0 : effect.place->traverse(visit, arg)) {
      return stop;
    }
  }
  return 0;
}

const Location* Effect::where() const {
  return object == nullptr ? place.get() : object->counter(index);
}

bool Effects::has_outputs() const {
  for (const auto& effect : effects_) {
    if (effect.store == Effect::Output) {
      return true;
    }
  }
  return false;
}

PyObject* Effects::first_unmet() const {
  for (const auto& effect : effects_) {
    const auto* const place = effect.where();
    if (place == nullptr) {
      return effect.label.ptr();
    }
    const auto value = place->get(place->container());
    bool met = static_cast<bool>(value);
    if (met && effect.high != effect.low) {
      const auto number = exact_int(value.ptr());
      met = number && effect.low <= *number && *number < effect.high;
    } else if (met && !effect.type.is_none()) {
      met = reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())) == effect.type.ptr();
    }
    if (!met) {
      return effect.label.ptr();
    }
  }
  return nullptr;
}

Effects::Found Effects::find() const {
  Found found;
  for (const auto& effect : effects_) {
    const auto* const place = effect.where();
    found.containers.push_back(place == nullptr ? py::object() : place->container());
    const auto value = place == nullptr ? py::object() : place->get(found.containers.back());
    found.ints.push_back(exact_int(value.ptr()).value_or(0));
  }
  return found;
}

// Other threads may have counted since the launch: sums are of what is there now.
void Effects::store(const Found& found) const {
  c10::SmallVector<py::object, 8> values;
  for (const auto& effect : effects_) {
    values.emplace_back();
    if (effect.store == Effect::Constant) {
      values.back() = effect.constant;
    } else if (effect.store == Effect::Sum) {
      const auto* const place = effects_[effect.base].where();
      const auto now = place == nullptr ? py::object() : place->get(found.containers[effect.base]);
      const int64_t number = exact_int(now.ptr()).value_or(found.ints[effect.base]);
      values.back() = py::reinterpret_steal<py::object>(PyLong_FromLongLong(number + effect.amount));
    }
  }
  for (size_t index = 0; index < effects_.size(); ++index) {
    const auto* const place = effects_[index].where();
    if (values[index] && place != nullptr) {
      place->set(found.containers[index], values[index].ptr());
    }
  }
}

void Effects::store_outputs(const Found& found, const py::tuple& outputs) const {
  for (size_t index = 0; index < effects_.size(); ++index) {
    const auto& effect = effects_[index];
    if (effect.store == Effect::Output) {
      effect.where()->set(found.containers[index], PyTuple_GetItem(outputs.ptr(), static_cast<Py_ssize_t>(effect.output)));
    }
  }
}

} // namespace graphcache
