#include "replay/dispatcher.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>

namespace py = pybind11;

namespace graphcache {
namespace {

thread_local bool inlining = false;

bool is_set(const py::object& variable) {
  PyObject* value = nullptr;
  if (PyContextVar_Get(variable.ptr(), nullptr, &value) != 0) {
    throw py::error_already_set();
  }
  const bool set = value == Py_True;
  Py_XDECREF(value);
  return set;
}

int64_t current_stream(const c10::Device& device) {
  if (device.is_cpu()) {
    return 0;
  }
  const auto* impl = c10::impl::getDeviceGuardImpl(device.type());
  return reinterpret_cast<int64_t>(impl->getStreamNativeHandle(impl->getStream(device)));
}

std::vector<PyObject*> values_of(PyObject* args, PyObject* kwargs) {
  auto** const first = PySequence_Fast_ITEMS(args);
  std::vector<PyObject*> values(first, first + PyTuple_GET_SIZE(args));
  PyObject* value = nullptr;
  for (Py_ssize_t position = 0; kwargs != nullptr && PyDict_Next(kwargs, &position, nullptr, &value) != 0;) {
    values.push_back(value);
  }
  return values;
}

} // namespace

bool set_inlining(bool on) {
  return std::exchange(inlining, on);
}

bool is_inlining() {
  return inlining;
}

Bucket* Entry::find(int64_t batch) const {
  const auto found = std::lower_bound(
      buckets.begin(), buckets.end(), batch, [](const auto& bucket, int64_t rows) {
        return bucket->size < rows;
      });
  if (found == buckets.end() || (unpadded && (*found)->size != batch) || batch == 0) {
    return nullptr;
  }
  return found->get();
}

py::object Dispatcher::miss() {
  static PyObject* const sentinel = PyObject_CallNoArgs(reinterpret_cast<PyObject*>(&PyBaseObject_Type));
  return py::reinterpret_borrow<py::object>(sentinel);
}

void Dispatcher::add(
    std::vector<Parameter> parameters,
    std::vector<Leaf> leaves,
    std::vector<size_t> identities,
    py::object training,
    std::shared_ptr<Entry> entry) {
  const auto modes = Modes::now(surroundings_.device_mode);
  if (modes) {
    known_.push_back(std::make_shared<Signature>(
        std::move(parameters), std::move(leaves), std::move(identities), training, *modes, std::move(entry)));
  }
}

void Dispatcher::forget(const std::shared_ptr<Entry>& entry) {
  const auto first = std::remove_if(
      known_.begin(), known_.end(), [&](const auto& signature) { return signature->entry == entry; });
  known_.erase(first, known_.end());
  last_ = 0;
}

py::object Dispatcher::serve(PyObject* args, PyObject* kwargs, PyObject* instance) {
  if (known_.empty() || inlining || is_set(surroundings_.disabled)) {
    return miss();
  }
  const auto modes = Modes::now(surroundings_.device_mode);
  if (!modes) {
    return miss();
  }
  py::object training = py::none();
  if (has_training_) {
    static PyObject* const name = PyUnicode_InternFromString("training");
    training = py::reinterpret_steal<py::object>(PyObject_GetAttr(instance, name));
    if (!training) {
      PyErr_Clear();
      return miss();
    }
  }
  Leaves leaves;
  int64_t batch = 0;
  Miss eager{};
  bool needs_python = false;
  for (size_t tried = 0; tried < known_.size(); ++tried) {
    const size_t index = (last_ + tried) % known_.size();
    const auto signature = known_[index]; // held: what runs here may be Python code, which may clear
    if (!signature->match(args, kwargs, training.ptr(), *modes, leaves, batch)) {
      continue;
    }
    if (signature->device().is_cpu() && !is_set(surroundings_.emulated)) {
      return miss();
    }
    const auto& entry = signature->entry;
    if (entry->eager) {
      eager = {{}, entry, batch};
      continue; // unless the values of now have graphs
    }
    auto* bucket = entry->find(batch);
    const std::unique_lock<PoolLock> locked(*entry->lock, std::try_to_lock);
    if (bucket == nullptr || !locked.owns_lock()) {
      needs_python = true;
      continue;
    }
    if (!bucket->dependencies.guard_passes(signature->grad())) {
      continue;
    }
    last_ = index;
    return run(*signature, *bucket, leaves, batch);
  }
  if (eager.entry != nullptr && !needs_python) {
    eager.values = values_of(args, kwargs);
    missed_ = std::move(eager);
  }
  return miss();
}

py::object Dispatcher::eager_reason(const py::tuple& args, const py::dict& kwargs) {
  const auto missed = std::exchange(missed_, {});
  if (missed.entry == nullptr || missed.values != values_of(args.ptr(), kwargs.ptr())) {
    return py::none();
  }
  missed.entry->last = calls;
  ++batches[missed.batch];
  return missed.entry->eager;
}

py::object Dispatcher::run(const Signature& signature, Bucket& bucket, const Leaves& leaves, int64_t batch) {
  const auto& device = signature.device();
  const int64_t stream = current_stream(device);
  if (!bucket.is_ready(batch) || stream != bucket.lane->stream || bucket.lane->is_held_elsewhere() ||
      bucket.dependencies.mutated->overlaps(leaves.tensors)) {
    return miss();
  }
  if (!device.is_cpu() &&
      (bucket.node() == nullptr ? py::cast<bool>(surroundings_.capturing())
                                : bucket.node()->is_capturing(reinterpret_cast<driver::Stream>(stream)))) {
    return miss();
  }
  signature.entry->last = ++calls;
  ++batches[batch];
  return bucket.run(leaves, batch, calls, stream);
}

} // namespace graphcache
