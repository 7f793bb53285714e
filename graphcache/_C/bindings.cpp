#include "guard.h"
#include "weak.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

at::Tensor exact_tensor(const py::handle& object) {
  if (!THPVariable_Check(object.ptr())) {
    throw py::type_error(
        "graphcache: expected a torch.Tensor, got " + std::string(Py_TYPE(object.ptr())->tp_name));
  }
  if (!THPVariable_CheckExact(object.ptr())) {
    throw py::type_error(
        "graphcache: a tensor subclass (" + std::string(Py_TYPE(object.ptr())->tp_name) +
        ") may keep its data elsewhere, so aliasing its memory could lose it; give the plain tensors "
        "that it is made of");
  }
  return THPVariable_Unpack(object.ptr());
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

// Guards refer to what may lead back to them, so Python's cycle collector has to see through them. An
// owner besides the Python object would need what they refer to: then nothing is shown.
graphcache::Guard* only_owned_guard(PyObject* object) {
  if (!py::detail::is_holder_constructed(object)) {
    return nullptr;
  }
  const auto guard = py::cast<std::shared_ptr<graphcache::Guard>>(py::handle(object));
  return guard.use_count() == 2 ? guard.get() : nullptr; // the other one is Python's
}

void make_collectable(PyHeapTypeObject* heap_type) {
  auto& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const auto* guard = only_owned_guard(self);
    return guard == nullptr ? 0 : guard->traverse(visit, arg);
  };
  type.tp_clear = [](PyObject* self) {
    if (auto* guard = only_owned_guard(self)) {
      guard->clear();
    }
    return 0;
  };
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
      "carve", &graphcache::carve, py::arg("tensor"), py::arg("offset"), py::arg("nbytes"));
  m.def("is_weak", &graphcache::is_weak, py::arg("tensor"));
  m.def(
      "expire",
      &graphcache::expire,
      py::arg("tensor"),
      py::arg("message") =
          "graphcache: this tensor was expired by graphcache.expire(); what it held may have been "
          "overwritten. Use it before that, or keep a copy with .clone()");
  m.def("is_expired", &graphcache::is_expired, py::arg("tensor"));
  m.def("storage_key", &graphcache::storage_key, py::arg("tensor"));
  m.def("is_held", &graphcache::is_held, py::arg("tensor"));
  m.def(
      "end_host_capture",
      &graphcache::end_host_capture,
      py::arg("pool_first"),
      py::arg("pool_second"));
  m.def("materialize", &graphcache::materialize, py::arg("tensor"));

  using graphcache::Guard;
  py::class_<Guard, std::shared_ptr<Guard>>(m, "Guard", py::custom_type_setup(&make_collectable))
      .def(py::init<>())
      .def(
          py::init<
              const Guard::Objects&,
              const py::object&,
              const Guard::Objects&,
              const Guard::Objects&,
              const Guard::Objects&>(),
          py::kw_only(),
          py::arg("modules"),
          py::arg("root"),
          py::arg("dicts"),
          py::arg("places"),
          py::arg("tensors"))
      .def("hold", &Guard::hold, py::arg("grad"));
}
