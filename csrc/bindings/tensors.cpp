// The Python face of weak tensors, their expiry and their ownership.
#include "bindings/bindings.h"
#include "tensors/python_tensor.h"
#include "tensors/strides.h"
#include "tensors/weak.h"

#include <optional>
#include <string>
#include <vector>

namespace graphcache {
namespace {

at::Tensor exact_tensor(const py::handle& object) {
  const std::string type = Py_TYPE(object.ptr())->tp_name;
  if (!is_tensor(object.ptr())) {
    throw py::type_error("graphcache: expected a torch.Tensor, got " + type);
  }
  if (!is_exact_tensor(object.ptr())) {
    throw py::type_error(
        "graphcache: a tensor subclass (" + type +
        ") may keep its data elsewhere, so aliasing its memory could lose it; give the plain tensors "
        "that it is made of");
  }
  return tensor_in(object.ptr());
}

py::object weak_ref(const py::handle& object) {
  if (!py::isinstance<py::list>(object) && !py::isinstance<py::tuple>(object)) {
    return py::cast(weak_refs({exact_tensor(object)}).front());
  }
  std::vector<at::Tensor> tensors;
  for (const auto item : py::reinterpret_borrow<py::sequence>(object)) {
    tensors.push_back(exact_tensor(item));
  }
  return py::cast(weak_refs(tensors)); // a list, in the same order
}

} // namespace

void bind_tensors(py::module_& m) {
  using at::Tensor;
  using Sizes = std::vector<int64_t>;
  m.def("weak_ref", &weak_ref, "tensor"_a);
  m.def(
      "alias",
      [](Tensor tensor, const Sizes& sizes, const Sizes& strides, int64_t offset, std::optional<Tensor> like) {
        return alias(tensor, sizes, strides, offset, like.value_or(tensor));
      },
      "tensor"_a, "sizes"_a, "strides"_a, "offset"_a, "like"_a = py::none());
  m.def(
      "carve",
      [](const Tensor& tensor, int64_t offset, int64_t nbytes) {
        return carve(storage_of(tensor), offset, nbytes);
      },
      "tensor"_a, "offset"_a, "nbytes"_a);
  m.def(
      "is_weak",
      [](const Tensor& tensor) { return tensor.has_storage() && is_weak(tensor.storage()); },
      "tensor"_a);
  m.def(
      "expire",
      [](const Tensor& tensor, const std::string& message) { expire(storage_of(tensor), message); },
      "tensor"_a,
      "message"_a =
          "graphcache: this tensor was expired by graphcache.expire(); what it held may have been "
          "overwritten. Use it before that, or keep a copy with .clone()");
  m.def("is_expired", [](const Tensor& tensor) { return is_expired(storage_of(tensor)); }, "tensor"_a);
  m.def(
      "storage_key",
      [](const Tensor& tensor) {
        return reinterpret_cast<int64_t>(storage_of(tensor).unsafeGetStorageImpl());
      },
      "tensor"_a);
  m.def(
      "stride_pattern",
      [](const Tensor& tensor) {
        py::tuple made(tensor.is_contiguous() ? 0 : tensor.dim());
        const auto pattern = stride_pattern(tensor.sizes(), tensor.strides());
        for (size_t index = 0; index < made.size(); ++index) {
          made[index] = pattern[index];
        }
        return made;
      },
      "tensor"_a);
  m.def("is_held", [](const Tensor& tensor) { return is_held(storage_of(tensor)); }, "tensor"_a);
  m.def("materialize", [](const Tensor& tensor) { materialize(storage_of(tensor)); }, "tensor"_a);
  m.def("end_host_capture", &end_host_capture, "pool_first"_a, "pool_second"_a);
}

} // namespace graphcache
