// The Python face of objects that keep tensors for a forward, and of their memory.
#include "guards/static_object.h"

#include <torch/csrc/utils/pybind.h>

namespace py = pybind11;

namespace graphcache {

void bind_static_objects(py::module_& m) {
  py::class_<StaticObject, std::shared_ptr<StaticObject>>(m, "StaticObject")
      .def(py::init<>())
      .def("bind", &StaticObject::bind, py::arg("object"), py::arg("guard"))
      .def("release", &StaticObject::release)
      .def(
          "holds",
          [](const StaticObject& keeper, const py::object& object) { return keeper.is(object.ptr()); },
          py::arg("object"))
      .def_property_readonly("object", &StaticObject::object)
      .def_readonly("calls", &StaticObject::calls);
  py::class_<LeasedMemory, std::shared_ptr<LeasedMemory>>(m, "LeasedMemory")
      .def(
          py::init([](const at::Tensor& tensor) { return std::make_shared<LeasedMemory>(tensor.storage()); }),
          py::arg("tensor"))
      .def(
          "adopt",
          [](LeasedMemory& memory, const at::Tensor& tensor) { memory.adopt(tensor.storage()); },
          py::arg("tensor"))
      .def("is_leased", &LeasedMemory::is_leased)
      .def(
          "is_leased_to",
          [](const LeasedMemory& memory, const at::Tensor& tensor) {
            return memory.is_leased_to(tensor.storage());
          },
          py::arg("tensor"));
  m.def("owned", &owned, py::arg("tensor"));
}

} // namespace graphcache
