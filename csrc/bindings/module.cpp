#include "tensors/python_tensor.h"
#include "tensors/weak.h"

#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace py = pybind11;

namespace graphcache {
void bind_guards(py::module_& m); // bindings/guards.cpp
void bind_static_objects(py::module_& m); // bindings/static_objects.cpp
void bind_replay(py::module_& m); // bindings/replay.cpp
void bind_call(py::module_& m); // call/entry_points.cpp
}

namespace {

at::Tensor exact_tensor(const py::handle& object) {
  if (!graphcache::is_tensor(object.ptr())) {
    throw py::type_error(
        "graphcache: expected a torch.Tensor, got " + std::string(Py_TYPE(object.ptr())->tp_name));
  }
  if (!graphcache::is_exact_tensor(object.ptr())) {
    throw py::type_error(
        "graphcache: a tensor subclass (" + std::string(Py_TYPE(object.ptr())->tp_name) +
        ") may keep its data elsewhere, so aliasing its memory could lose it; give the plain tensors "
        "that it is made of");
  }
  return graphcache::tensor_in(object.ptr());
}

py::object weak_ref(const py::handle& object) {
  if (!py::isinstance<py::list>(object) && !py::isinstance<py::tuple>(object)) {
    return py::cast(graphcache::weak_refs({exact_tensor(object)}).front());
  }
  std::vector<at::Tensor> tensors;
  for (const auto item : py::reinterpret_borrow<py::sequence>(object)) {
    tensors.push_back(exact_tensor(item));
  }
  return py::cast(graphcache::weak_refs(tensors)); // a list, in the same order
}

const c10::Storage& storage_of(const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(
      tensor.has_storage(), "graphcache: a tensor of layout ", tensor.layout(), " has no storage");
  return tensor.storage();
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("TORCH_VERSION") = TORCH_VERSION;
  m.def("weak_ref", &weak_ref, py::arg("tensor"));
  m.def(
      "alias",
      [](const at::Tensor& tensor,
         const std::vector<int64_t>& sizes,
         const std::vector<int64_t>& strides,
         int64_t offset,
         const std::optional<at::Tensor>& like) {
        return graphcache::alias(tensor, sizes, strides, offset, like.value_or(tensor));
      },
      py::arg("tensor"),
      py::arg("sizes"),
      py::arg("strides"),
      py::arg("offset"),
      py::arg("like") = py::none());
  m.def(
      "carve",
      [](const at::Tensor& tensor, int64_t offset, int64_t nbytes) {
        return graphcache::carve(storage_of(tensor), offset, nbytes);
      },
      py::arg("tensor"),
      py::arg("offset"),
      py::arg("nbytes"));
  m.def(
      "is_weak",
      [](const at::Tensor& tensor) {
        return tensor.has_storage() && graphcache::is_weak(tensor.storage());
      },
      py::arg("tensor"));
  m.def(
      "expire",
      &graphcache::expire,
      py::arg("tensor"),
      py::arg("message") =
          "graphcache: this tensor was expired by graphcache.expire(); what it held may have been "
          "overwritten. Use it before that, or keep a copy with .clone()");
  m.def(
      "is_expired",
      [](const at::Tensor& tensor) { return graphcache::is_expired(tensor); },
      py::arg("tensor"));
  m.def("storage_key", &graphcache::storage_key, py::arg("tensor"));
  m.def(
      "is_held",
      [](const at::Tensor& tensor) { return graphcache::is_held(storage_of(tensor)); },
      py::arg("tensor"));
  m.def(
      "end_host_capture",
      &graphcache::end_host_capture,
      py::arg("pool_first"),
      py::arg("pool_second"));
  m.def(
      "materialize",
      [](const at::Tensor& tensor) { graphcache::materialize(storage_of(tensor)); },
      py::arg("tensor"));
  graphcache::bind_guards(m);
  graphcache::bind_static_objects(m);
  graphcache::bind_replay(m);
  graphcache::bind_call(m);
}
