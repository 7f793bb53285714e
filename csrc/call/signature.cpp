#include "call/signature.h"

#include "tensors/python_tensor.h"
#include "tensors/strides.h"
#include "tensors/weak.h"

#include <c10/core/DispatchKeySet.h>

#include <algorithm>
#include <set>

namespace py = pybind11;

namespace graphcache {
namespace {

// Without the keys that inference tensors lack: those are served by the same graphs.
uint64_t keys_of(const at::Tensor& tensor) {
  static const uint64_t ignored =
      c10::autograd_dispatch_keyset_with_ADInplaceOrView.raw_repr() & ~c10::full_backend_mask;
  return tensor.key_set().raw_repr() & ~ignored;
}

} // namespace

PyObject* Parameter::fallback() const {
  if (!function) {
    return nullptr;
  }
  PyObject* owner = reinterpret_cast<PyWeakReference*>(function.ptr())->wr_object;
  if (!PyFunction_Check(owner)) {
    return nullptr; // it is gone
  }
  if (PyUnicode_Check(default_key.ptr())) {
    PyObject* by_name = PyFunction_GET_KW_DEFAULTS(owner);
    return by_name == nullptr ? nullptr : PyDict_GetItem(by_name, default_key.ptr());
  }
  PyObject* values = PyFunction_GET_DEFAULTS(owner);
  const Py_ssize_t index = values == nullptr ? -1 : PyTuple_GET_SIZE(values) + PyLong_AsSsize_t(default_key.ptr());
  return index < 0 ? nullptr : PyTuple_GET_ITEM(values, index);
}

Leaf::Leaf(
    Role role,
    int64_t batch_dim,
    bool carries_batch,
    bool must_be_weak,
    std::vector<int64_t> pattern,
    std::vector<int64_t> exact,
    std::optional<bool> inference,
    PyObject* example)
    : role(role),
      batch_dim(batch_dim),
      carries_batch(carries_batch),
      must_be_weak(must_be_weak),
      pattern(std::move(pattern)),
      exact(std::move(exact)),
      inference(inference),
      type(Py_TYPE(example)),
      keys(keys_of(tensor_in(example))),
      dtype(tensor_in(example).dtype()),
      device(tensor_in(example).device()),
      requires_grad(tensor_in(example).requires_grad()),
      is_leaf(tensor_in(example).is_leaf()),
      sizes(tensor_in(example).sizes().vec()),
      strides(tensor_in(example).strides().vec()),
      address(tensor_in(example).const_data_ptr()) {}

bool Leaf::matches(PyObject* object, const at::Tensor& tensor, int64_t batch, bool grad) const {
  const auto given = tensor.sizes();
  if (Py_TYPE(object) != type || keys_of(tensor) != keys || tensor.dtype() != dtype ||
      tensor.device() != device || given.size() != sizes.size() || tensor.requires_grad() != requires_grad ||
      (requires_grad && (grad || tensor.is_leaf() != is_leaf)) ||
      (inference && tensor.is_inference() != *inference)) {
    return false;
  }
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    const bool free = role == Batched && static_cast<int64_t>(dim) == batch_dim;
    if (given[dim] != (free ? batch : sizes[dim])) {
      return false;
    }
  }
  if (batch_dim >= 0 && (given[batch_dim] == batch) != carries_batch) {
    return false;
  }
  if (role == Bound) {
    return !is_weak(tensor.storage()) && tensor.const_data_ptr() == address &&
        tensor.strides() == at::IntArrayRef(strides);
  }
  if (must_be_weak && !is_weak(tensor.storage())) {
    return false;
  }
  return (exact.empty() && pattern.empty() && tensor.is_contiguous()) || matches_strides(tensor);
}

bool Leaf::matches_strides(const at::Tensor& tensor) const {
  const bool same = tensor.is_contiguous()
      ? pattern.empty()
      : at::IntArrayRef(stride_pattern(tensor.sizes(), tensor.strides())) == at::IntArrayRef(pattern);
  if (!same || exact.empty()) {
    return same;
  }
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (exact[dim] >= 0 && exact[dim] != tensor.stride(dim)) {
      return false;
    }
  }
  return exact.back() < 0 || exact.back() == tensor.storage_offset();
}

Signature::Signature(
    std::vector<Parameter> parameters,
    std::vector<Leaf> leaves,
    std::vector<size_t> identities,
    py::object training,
    Modes modes,
    std::shared_ptr<Entry> entry)
    : entry(std::move(entry)),
      parameters_(std::move(parameters)),
      leaves_(std::move(leaves)),
      identities_(std::move(identities)),
      distinct_(std::set<size_t>(identities_.begin(), identities_.end()).size()),
      training_(std::move(training)),
      modes_(modes) {
  const auto first = std::find_if(leaves_.begin(), leaves_.end(), [](const Leaf& leaf) {
    return leaf.role != Leaf::Bound && leaf.batch_dim >= 0;
  });
  TORCH_CHECK_VALUE(first != leaves_.end(), "graphcache: no argument carries the batch");
  batch_leaf_ = first - leaves_.begin();
  for (const auto& parameter : parameters_) {
    positional_ = std::max<Py_ssize_t>(positional_, parameter.position + 1);
    if (parameter.ordered) {
      ordered_.push_back(parameter.name.ptr());
    }
  }
}

bool Signature::match(
    PyObject* args,
    PyObject* kwargs,
    PyObject* training,
    const Modes& modes,
    Leaves& leaves,
    int64_t& batch) const {
  leaves.clear();
  if (training != training_.ptr() || !(modes == modes_) || !match_parameters(args, kwargs, leaves) ||
      leaves.tensors.size() != leaves_.size()) {
    return false;
  }
  const auto& carrier = *leaves.tensors[batch_leaf_];
  if (carrier.dim() <= leaves_[batch_leaf_].batch_dim) {
    return false;
  }
  batch = carrier.size(leaves_[batch_leaf_].batch_dim);
  for (size_t index = 0; index < leaves_.size(); ++index) {
    if (!leaves_[index].matches(leaves.objects[index], *leaves.tensors[index], batch, modes.grad)) {
      return false;
    }
  }
  return leaves_.size() == 1 || match_identities(leaves);
}

// Arguments are one tensor where they were at the capture, and nowhere else: a forward may ask
// (`key is value`).
bool Signature::match_identities(const Leaves& leaves) const {
  c10::SmallVector<const void*, 16> tensors;
  for (const auto* tensor : leaves.tensors) {
    tensors.push_back(tensor->unsafeGetTensorImpl());
  }
  for (size_t index = 0; index < identities_.size(); ++index) {
    if (tensors[index] != tensors[identities_[index]]) {
      return false;
    }
  }
  std::sort(tensors.begin(), tensors.end());
  return static_cast<size_t>(std::unique(tensors.begin(), tensors.end()) - tensors.begin()) == distinct_;
}

bool Signature::match_parameters(PyObject* args, PyObject* kwargs, Leaves& leaves) const {
  const Py_ssize_t given = PyTuple_GET_SIZE(args);
  Py_ssize_t by_name = kwargs == nullptr ? 0 : PyDict_GET_SIZE(kwargs);
  if (given > positional_) {
    return false;
  }
  for (const auto& parameter : parameters_) {
    PyObject* value = nullptr;
    if (parameter.position >= 0 && parameter.position < given) {
      value = PyTuple_GET_ITEM(args, parameter.position);
    } else if (parameter.name && by_name > 0) {
      value = PyDict_GetItemWithError(kwargs, parameter.name.ptr());
      if (value != nullptr) {
        --by_name;
      } else if (PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        return false;
      }
    }
    if (value == nullptr) {
      value = parameter.fallback();
    }
    if (value == nullptr || !parameter.layout.match(value, leaves)) {
      return false;
    }
  }
  return by_name == 0 && (ordered_.size() < 2 || match_order(kwargs));
}

// All of the names are given. So they are in order if they come up one after the other.
bool Signature::match_order(PyObject* kwargs) const {
  size_t next = 0;
  PyObject* name = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(kwargs, &position, &name, nullptr) != 0;) {
    next += next < ordered_.size() &&
        (name == ordered_[next] || PyUnicode_Compare(name, ordered_[next]) == 0);
  }
  return next == ordered_.size();
}

} // namespace graphcache
